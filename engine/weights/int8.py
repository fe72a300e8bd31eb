"""Weights as 8-bit integers with a scale for each output channel: a quarter of float32's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pilotfish.engine.weights.scheme import Scheme

if TYPE_CHECKING:
    import torch


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Scheme.quantize`. A row's largest number becomes 127 or -127."""
    import torch

    matrix = matrix.float()
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round().to(torch.int8), scale


SCHEME = Scheme(
    name="int8",
    storage="int8",
    safetensors="I8",
    bytes=1,
    quantize=quantize,
    kernels=("native", "torch"),
    dtypes=("float32",),
    on_cpu=True,
)
