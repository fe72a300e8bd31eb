"""From a model's name to a loaded model: files, shape, kernels, weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pilotfish.checkpoints.catalog import ModelFiles, Progress, resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import compute_capability, give_back_memory
from pilotfish.engine.kernels.fp8 import FP8_CAPABILITY
from pilotfish.engine.kernels.native import VECTOR, NativeKernels, load_library
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.choose import AttentionNeeds, choose_attention, why_not
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.eagle3 import SharedWeights
from pilotfish.engine.models.layout import Layout, check_divides
from pilotfish.engine.models.model import Model
from pilotfish.engine.models.registry import model_class
from pilotfish.engine.weights import iter_weights, read_config
from pilotfish.engine.weights.dummy import iter_weights as dummy_weights
from pilotfish.engine.weights.names import HEAD, Part, expected_shapes, whole
from pilotfish.engine.weights.quantization import SCALE, dequantized, quantized
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Platform:
    """Where and how a model computes."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels[Any]
    attention: AttentionBackend
    needs: AttentionNeeds
    """What the attention backend was chosen for, the block size settled."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""
        return self.needs.block_size

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.needs.cache_dtype

    @property
    def kernels_name(self) -> str:
        """Of the kernels, and of the attention where it is not theirs."""
        return self.kernels.name + (f"+{self.attention.name}" if self.attention.name != self.kernels.name else "")


def choose_platform(config: EngineConfig, model: ModelConfig, ranks: int = 1) -> Platform:
    """Where `model`, divided over `ranks`, will compute, its threads set up.

    Raises ConfigError where the settings ask for what this machine or model cannot do.
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
    if config.kernels == "torch" or reason:
        if reason and config.kernels == "auto" and device.type == "cpu":
            logger.warning("running on torch's operators: %s", reason)
        torch.set_num_threads(thread_count(config))
    else:
        kernels = NativeKernels()
        kernels.set_threads(thread_count(config))
        # What is left to torch is small, and its threads, which spin, would only be in the way of the kernels' own.
        torch.set_num_threads(1)
    needs = AttentionNeeds(
        device=device,
        capability=compute_capability(device),
        dtype=dtype,
        cache_dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype,
        head_dim=model.head_dim,
        block_size=config.block_size,
    )
    native = kernels if isinstance(kernels, NativeKernels) else None
    attention = choose_attention(config.attention_backend, needs, native)
    platform = Platform(
        device, dtype, kernels, attention, replace(needs, block_size=config.block_size or attention.block_size)
    )
    logger.info("attention: %s, blocks of %d tokens", attention.name, platform.block_size)
    return platform


def _choose_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device here")
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _why_not_native(
    device: torch.device, dtype: torch.dtype, model: ModelConfig, config: EngineConfig, ranks: int
) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"the native kernels compute in float32 on the CPU, not in {dtype} on {device}"
    if config.quantization == "fp8":
        return "the native kernels compute in float32, not with weights in fp8"
    inner = "intermediate_size" if ranks == 1 else "intermediate_size on each rank"
    sizes = {"hidden_size": model.hidden_size, inner: model.intermediate_size // ranks, "head_dim": model.head_dim}
    for what, size in sizes.items():
        if size % VECTOR:
            return f"the model's {what} ({size}) is not a multiple of {VECTOR}"
    if config.block_size % VECTOR:
        return f"block_size ({config.block_size}) is not a multiple of {VECTOR}"
    if load_library() is None:
        return "the native kernels were not built (no C compiler at installation)"
    return None


def check_draft(platform: Platform, name: str, model: ModelConfig, config: EngineConfig, ranks: int = 1) -> None:
    """Raise ConfigError where a draft, divided over `ranks`, cannot compute as the target does."""
    reason = why_not(platform.attention.name, replace(platform.needs, head_dim=model.head_dim))
    if reason:
        raise ConfigError(f"drafter {name!r}: {reason}; attention_backend names another one for both models")
    if platform.kernels.name == "native":
        reason = _why_not_native(platform.device, platform.dtype, model, config, ranks)
        if reason:
            raise ConfigError(f"drafter {name!r}: {reason}; kernels 'torch' serves both models")


def computes_in_fp8(config: EngineConfig, model: ModelConfig, capability: tuple[int, int] | None) -> bool:
    """Whether the layers' matrices are in fp8 when they are loaded."""
    if config.quantization == "fp8":
        if capability is not None and capability < FP8_CAPABILITY:
            wanted, has = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, capability))
            raise ConfigError(f"quantization is 'fp8', which needs compute capability {wanted} or newer, not {has}")
        return True
    there = capability is not None and capability >= FP8_CAPABILITY
    return config.quantization == "auto" and model.fp8 is not None and there


def thread_count(config: EngineConfig) -> int:
    if config.num_threads:
        return config.num_threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_model(
    name: str,
    platform: Platform | None,
    config: EngineConfig,
    max_positions: int,
    progress: Progress,
    comm: Communicator = ALONE,
) -> tuple[Model, Platform, ModelFiles]:
    """Read a model's weights onto its device: all, or what rank `comm.rank` has of a model that is divided.

    `platform` is the target's; None: `name` is the target, and gets the one that `config` chooses for it.
    `max_positions` 0: as many as the model was made for. Raises ModelError, ConfigError.
    """
    files = resolve(name, weights=config.load_format != "dummy")
    shape = read_config(files)
    setting = "tensor_parallel_size" if platform is None else "draft_tensor_parallel_size"
    check_divides(shape, comm.size, False, setting, files.name)
    if platform is None:
        platform = choose_platform(config, shape, comm.size)
    else:
        check_draft(platform, name, shape, config, comm.size)
    if computes_in_fp8(config, shape, platform.needs.capability):
        check_divides(shape, comm.size, True, setting, files.name)
    weights = _weights(files, shape, platform, config, Layout(shape, comm.rank, comm.size).parts(), progress)
    positions = max_positions or shape.max_position
    with torch.inference_mode():
        model = model_class(shape.architecture)(
            shape, platform.kernels, platform.attention, weights, positions, platform.device, comm
        )
    give_back_memory(platform.device)  # of parts that have become one matrix, and of what was read ahead
    return model, platform, files


def _weights(
    files: ModelFiles,
    shape: ModelConfig,
    platform: Platform,
    config: EngineConfig,
    parts: Mapping[str, Part],
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Those parts of a model's tensors, in the dtypes that they are computed with."""
    device, dtype = platform.device, platform.dtype
    dummy = config.load_format == "dummy"
    fp8 = computes_in_fp8(config, shape, platform.needs.capability)
    if shape.fp8 is not None and not fp8 and not dummy:
        logger.info("%s: its fp8 weights become %s, which takes more memory", files.name, dtype)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        stored = (
            dummy_weights(shape, dtype, device, parts) if dummy else iter_weights(files, shape, dtype, parts, device)
        )
        for item in stored:
            yield item
            done += not item[0].endswith(SCALE)
            progress(f"loading {files.name}", done / len(parts))

    if fp8:
        return quantized(read(), shape.fp8.unquantized if shape.fp8 else (), device)
    return read() if shape.fp8 is None else dequantized(read(), dtype)


def load_shared(
    target: Model, platform: Platform, config: EngineConfig, embedding: bool, head: bool, progress: Progress
) -> SharedWeights:
    """The target's embedding and head, those of the two that a draft on rank 0 needs: whole, read once more where the
    target has only a part of them here. What is not needed may be a part."""
    shared = SharedWeights(target.embedding, target.head)
    names = {"model.embed_tokens.weight"} if embedding else set()
    if head:
        names.add("model.embed_tokens.weight" if target.config.tie_embeddings else HEAD)
    if target.comm.size == 1 or not names:
        return shared
    files = resolve(config.model, weights=config.load_format != "dummy")
    shapes = expected_shapes(target.config)
    parts = {name: whole(shapes[name]) for name in names}
    prepared = {}
    with torch.inference_mode():
        weights = dict(_weights(files, target.config, platform, config, parts, progress))
        for name in names:
            scale = weights.get(name + SCALE)
            prepared[name] = platform.kernels.prepare_linear(weights[name].to(platform.device), None, scale)
    return SharedWeights(
        prepared.get("model.embed_tokens.weight", shared.embedding),
        prepared.get("model.embed_tokens.weight" if target.config.tie_embeddings else HEAD, shared.head),
    )
