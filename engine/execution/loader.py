"""From a model's name to a loaded model: files, shape, kernels, weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.config import EngineConfig
from engine.device import compute_capability
from engine.errors import ConfigError
from engine.kernels.fp8 import FP8_CAPABILITY
from engine.kernels.interface import Kernels
from engine.kernels.native import VECTOR, NativeKernels, load_library
from engine.kernels.torch import TorchKernels
from engine.layers.attention.choose import AttentionNeeds, choose_attention, why_not
from engine.layers.attention.interface import AttentionBackend
from engine.models.config import ModelConfig
from engine.models.interface import Model
from engine.models.registry import model_class
from engine.weights import iter_weights, read_config
from engine.weights.catalog import ModelFiles, resolve
from engine.weights.dummy import iter_weights as dummy_weights
from engine.weights.names import expected_shapes
from engine.weights.quantization import SCALE, dequantized, quantized

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Told what is being done and the share of it that is done."""


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


def choose_platform(config: EngineConfig, model: ModelConfig) -> Platform:
    """Where `model` will compute, its threads set up.

    Raises ConfigError where the settings ask for what this machine or model cannot do.
    """
    device = _choose_device(config)
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype  # type: ignore[assignment]
    dtype = getattr(torch, name)
    kernels: NativeKernels | TorchKernels = TorchKernels()
    reason = _why_not_native(device, dtype, model, config)
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


def _why_not_native(device: torch.device, dtype: torch.dtype, model: ModelConfig, config: EngineConfig) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"the native kernels compute in float32 on the CPU, not in {dtype} on {device}"
    if config.quantization == "fp8":
        return "the native kernels compute in float32, not with weights in fp8"
    sizes = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size, "head_dim": model.head_dim}
    for what, size in sizes.items():
        if size % VECTOR:
            return f"the model's {what} ({size}) is not a multiple of {VECTOR}"
    if config.block_size % VECTOR:
        return f"block_size ({config.block_size}) is not a multiple of {VECTOR}"
    if load_library() is None:
        return "the native kernels were not built (no C compiler at installation)"
    return None


def check_draft(platform: Platform, name: str, model: ModelConfig, config: EngineConfig) -> None:
    """Raise ConfigError where a draft cannot compute as the target does."""
    reason = why_not(platform.attention.name, replace(platform.needs, head_dim=model.head_dim))
    if reason:
        raise ConfigError(f"drafter {name!r}: {reason}; attention_backend names another one for both models")
    if platform.kernels.name == "native":
        reason = _why_not_native(platform.device, platform.dtype, model, config)
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
    name: str, platform: Platform | None, config: EngineConfig, max_positions: int, progress: Progress
) -> tuple[Model, Platform, ModelFiles]:
    """Read a model's weights onto its device. `platform` None: the one that `config` chooses for this model.

    `max_positions` 0: as many as the model was made for. Raises ModelError, ConfigError.
    """
    dummy = config.load_format == "dummy"
    files = resolve(name, weights=not dummy)
    shape = read_config(files)
    if platform is None:
        platform = choose_platform(config, shape)
    else:
        check_draft(platform, name, shape, config)
    device, dtype = platform.device, platform.dtype
    fp8 = computes_in_fp8(config, shape, platform.needs.capability)
    if shape.fp8 is not None and not fp8 and not dummy:
        logger.info("%s: its fp8 weights become %s, which takes more memory", files.name, dtype)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        total, done = len(expected_shapes(shape)), 0
        for item in dummy_weights(shape, dtype, device) if dummy else iter_weights(files, shape, dtype):
            yield item
            done += not item[0].endswith(SCALE)
            progress(f"loading {files.name}", done / total)

    weights = read()
    if fp8:
        weights = quantized(weights, shape.fp8.unquantized if shape.fp8 else (), device)
    elif shape.fp8 is not None:
        weights = dequantized(weights, dtype)
    with torch.inference_mode():
        model = model_class(shape.architecture)(
            shape, platform.kernels, platform.attention, weights, max_positions or shape.max_position, device
        )
    return model, platform, files
