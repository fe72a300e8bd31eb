"""Platform: where and how a model computes, chosen by the settings and what this machine has."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import compute_capability
from pilotfish.engine.device.gpu import use_gpu
from pilotfish.engine.execution.triton_check import Sizes, checked_triton
from pilotfish.engine.kernels.native import VECTOR, NativeKernels, load_library
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.choose import AttentionNeeds, choose_attention, why_not
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.weights.blocks import PLAIN, QUANTIZED_TO, Storage
from pilotfish.engine.weights.quantization import SCHEMES, Quantization
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What `kv_cache_dtype` may be besides "auto"."""


@dataclass(frozen=True, slots=True)
class Platform:
    """The device, dtype and kernels that a model computes with."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels[Any]
    attention: AttentionBackend
    needs: AttentionNeeds
    """What the attention backend was chosen for, with the resulting block size."""
    storage: Storage = PLAIN
    """The forms of matrices in memory."""
    code: str = ""
    """Whose code computes the target, if not the engine's."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""
        return self.needs.block_size

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.needs.cache_dtype

    @property
    def kernels_name(self) -> str:
        """The kernels' name, followed by the attention backend's if it is another one."""
        if self.code:
            return f"{self.code}+{self.attention.name}"
        return self.kernels.name + (f"+{self.attention.name}" if self.attention.name != self.kernels.name else "")


def choose_platform(config: EngineConfig, model: ModelConfig, ranks: int = 1) -> Platform:
    """Choose where `model`, sharded over `ranks`, will compute, and set up its threads.

    Raises ConfigError for settings that this machine or model cannot satisfy.
    """
    device = _choose_device(config)
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype  # type: ignore[assignment]
    dtype = getattr(torch, name)
    kernels: NativeKernels | TorchKernels = TorchKernels()
    reason = _why_not_native(device, dtype, model, config, ranks)
    if config.kernels == "native" and reason:
        raise ConfigError(f"kernels is 'native', but {reason}")
    if config.quantization in QUANTIZED_TO and (reason or config.kernels == "torch"):
        raise ConfigError(
            f"quantization is {config.quantization!r}, which the native kernels compute with, but "
            f"{reason or 'kernels is torch'}: leave it out" + (", or use 'fp8'" if device.type == "cuda" else "")
        )
    if config.kernels == "torch" or reason:
        if reason and config.kernels == "auto" and device.type == "cpu":
            logger.warning("running on torch's operators: %s", reason)
        torch.set_num_threads(thread_count(config))
    else:
        kernels = NativeKernels()
        kernels.set_threads(thread_count(config))
        if kernels.level == 0:
            logger.warning("this processor has no AVX2: the native kernels run in generic C, several times slower")
        # Little is left to torch, and its threads, which spin, would only slow down the kernels' own.
        torch.set_num_threads(1)
    if config.kernels == "triton" and (reason := _why_not_triton(device)):
        raise ConfigError(f"kernels is 'triton', but {reason}")
    needs = AttentionNeeds(
        device=device,
        capability=compute_capability(device),
        dtype=dtype,
        cache_dtype=CACHE_DTYPES.get(config.kv_cache_dtype, dtype),
        head_dim=model.head_dim,
        block_size=config.block_size,
        softcap=model.attention_softcap is not None,
        sinks=model.attention_sinks,
    )
    native = kernels if isinstance(kernels, NativeKernels) else None
    attention = choose_attention(config.attention_backend, needs, native)
    if config.kernels == "triton" or (config.kernels == "auto" and device.type == "cuda"):
        kernels = _triton_kernels(needs, model, ranks)
    platform = Platform(
        device,
        dtype,
        kernels,
        attention,
        replace(needs, block_size=config.block_size or attention.block_size),
        storage=_storage(config, native),
    )
    logger.info(
        "kernels: %s; attention: %s, blocks of %d tokens in %s",
        *(kernels.name, attention.name, platform.block_size, str(needs.cache_dtype).removeprefix("torch.")),
    )
    return platform


def _storage(config: EngineConfig, kernels: NativeKernels | None) -> Storage:
    """Below AVX2 blocks and 16 bits would be computed with more slowly than float32."""
    if kernels is None:
        return PLAIN
    halves = config.dtype == "auto" and kernels.level > 0
    layers, vocabulary = QUANTIZED_TO.get(config.quantization, (None, None))
    blocks = (halves and config.quantization == "auto") or layers is not None
    return Storage(blocks=blocks, halves=halves, layers=layers, vocabulary=vocabulary)


def _why_not_triton(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernels compute on NVIDIA GPUs, not on {device}"
    return None


def _triton_kernels(needs: AttentionNeeds, model: ModelConfig, ranks: int) -> TorchKernels:
    if needs.capability is not None and needs.capability < (8, 0):
        return TorchKernels()
    layout = Layout(model, 0, ranks)
    sizes = Sizes(
        hidden=model.hidden_size,
        intermediate=layout.intermediate_size,
        heads=layout.num_heads,
        kv_heads=layout.num_kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
    )
    with torch.inference_mode():
        fp8 = SCHEMES["fp8"].is_native(needs.capability)
        return checked_triton(needs.device, needs.dtype, needs.cache_dtype, sizes, fp8)


def _choose_device(config: EngineConfig) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu(config.device) else torch.device("cpu")


def _why_not_native(
    device: torch.device, dtype: torch.dtype, model: ModelConfig, config: EngineConfig, ranks: int
) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"the native kernels compute in float32 on the CPU, not in {dtype} on {device}"
    scheme = None if config.quantization in QUANTIZED_TO else SCHEMES.get(config.quantization)
    if scheme is not None and "native" not in scheme.kernels:
        return f"the native kernels compute in float32, not with weights in {scheme.name}"
    end = "" if ranks == 1 else " on each rank"
    inner = {
        name + end: size if model.expert_parallel and name == "experts.size" else size // ranks
        for name, size in model.inner_sizes().items()
    }
    sizes = {"hidden_size": model.hidden_size, **inner, "head_dim": model.head_dim}
    for what, size in sizes.items():
        if size % VECTOR:
            return f"the model's {what} ({size}) is not a multiple of {VECTOR}"
    if config.block_size % VECTOR:
        return f"block_size ({config.block_size}) is not a multiple of {VECTOR}"
    if load_library() is None:
        return "the native kernels were not built (no C compiler at installation)"
    return None


def check_draft(platform: Platform, name: str, model: ModelConfig, config: EngineConfig, ranks: int = 1) -> None:
    """Raise ConfigError if a draft model, sharded over `ranks`, cannot compute on the target's platform."""
    needs = replace(
        platform.needs,
        head_dim=model.head_dim,
        softcap=model.attention_softcap is not None,
        sinks=model.attention_sinks,
    )
    reason = why_not(platform.attention.name, needs)
    if reason:
        raise ConfigError(f"drafter {name!r}: {reason}; attention_backend names another one for both models")
    if platform.kernels.name == "native":
        reason = _why_not_native(platform.device, platform.dtype, model, config, ranks)
        if reason:
            raise ConfigError(f"drafter {name!r}: {reason}; kernels 'torch' serves both models")


def choose_quantization(
    config: EngineConfig, model: ModelConfig, capability: tuple[int, int] | None
) -> Quantization | None:
    """How the layers' matrices are quantized once they are loaded, on a device of this compute capability (None: a
    CPU). Raises ConfigError for a scheme that the device cannot compute with."""
    stored, setting = model.quantization, config.quantization
    if setting in QUANTIZED_TO:  # `Storage` has it
        return None
    if setting in SCHEMES:
        if reason := SCHEMES[setting].why_not(capability):
            raise ConfigError(f"quantization is {setting!r}, which {reason}")
        return Quantization(setting, stored.unquantized if stored is not None else ())
    if setting == "none" or stored is None:
        return None
    return stored if SCHEMES[stored.scheme].is_native(capability) else None


def thread_count(config: EngineConfig) -> int:
    """CPU threads of a process: `num_threads`, or one per core that it may use."""
    if config.num_threads:
        return config.num_threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
