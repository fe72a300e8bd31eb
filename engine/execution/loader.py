"""From a model's name to a loaded model: files, shape, kernels, weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.interface import Kernels
from engine.kernels.native import VECTOR, NativeKernels, load_library
from engine.kernels.torch import TorchKernels
from engine.layers.attention.interface import AttentionBackend
from engine.layers.attention.native import NativeAttention
from engine.layers.attention.torch import TorchAttention
from engine.models.config import ModelConfig
from engine.models.interface import Model
from engine.models.registry import model_class
from engine.weights import iter_weights, read_config
from engine.weights.catalog import ModelFiles, resolve
from engine.weights.names import expected_shapes

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


def choose_platform(config: EngineConfig, model: ModelConfig) -> Platform:
    """Where `model` will compute, its threads set up.

    Raises ConfigError where the settings ask for what this machine or model cannot do.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device here")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype  # type: ignore[assignment]
    dtype = getattr(torch, name)
    reason = _why_not_native(device, dtype, model, config.block_size)
    if config.kernels == "native" and reason:
        raise ConfigError(f"kernels is 'native', but {reason}")
    if config.kernels == "torch" or reason:
        if reason and config.kernels == "auto" and device.type == "cpu":
            logger.warning("running on torch's operators: %s", reason)
        torch.set_num_threads(thread_count(config))
        return Platform(device, dtype, TorchKernels(), TorchAttention())
    kernels = NativeKernels()
    kernels.set_threads(thread_count(config))
    # What is left to torch is small, and its threads, which spin, would only be in the way of the kernels' own.
    torch.set_num_threads(1)
    return Platform(device, dtype, kernels, NativeAttention(kernels))


def _why_not_native(device: torch.device, dtype: torch.dtype, model: ModelConfig, block_size: int) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"the native kernels compute in float32 on the CPU, not in {dtype} on {device}"
    sizes = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size, "head_dim": model.head_dim}
    for what, size in sizes.items():
        if size % VECTOR:
            return f"the model's {what} ({size}) is not a multiple of {VECTOR}"
    if block_size % VECTOR:
        return f"block_size ({block_size}) is not a multiple of {VECTOR}"
    if load_library() is None:
        return "the native kernels were not built (no C compiler at installation)"
    return None


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
    files = resolve(name)
    shape = read_config(files)
    platform = platform or choose_platform(config, shape)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        total = len(expected_shapes(shape))
        for i, item in enumerate(iter_weights(files, shape, platform.dtype)):
            yield item
            progress(f"loading {files.name}", (i + 1) / total)

    with torch.inference_mode():
        model = model_class(shape.architecture)(
            shape, platform.kernels, platform.attention, weights(), max_positions or shape.max_position, platform.device
        )
    return model, platform, files
