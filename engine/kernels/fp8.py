"""Matrix products in 8-bit floating point (float8_e4m3fn of OCP's specification, arXiv 2209.05433).

A weight has a scale for each output channel, fixed at loading; an activation one for each row (token), found as it
comes. On CUDA the product is torch._scaled_mm's with row-wise scales; elsewhere it is the same arithmetic in float32,
the reference that the former is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""448."""

FP8_CAPABILITY = (8, 9)
"""The compute capability of the first CUDA devices that have fp8's products: Ada; Hopper and Blackwell follow."""

MULTIPLE = 16
"""What both of a weight's sizes must be a multiple of: torch._scaled_mm's rule on CUDA."""

_TINY = 1e-12
"""Least largest number of a row, so that a row of zeros has a scale to be divided by."""


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    weight: torch.Tensor  # (out_features, in_features) float8_e4m3fn
    scale: torch.Tensor  # (1, out_features) float32: what each output channel is multiplied by
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, size) as float8_e4m3fn (rows, size) and scales (rows, 1) float32, so that x is about their product.

    A row's largest number becomes 448, the largest there is; a row's result does not depend on the other rows.
    """
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_(min=_TINY).div_(LARGEST)
    # Clamped, because the division may round up to what is no number in fp8, or NaN on some devices.
    return (x / scale).clamp_(-LARGEST, LARGEST).to(FP8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight (out_features, in_features) times scale (out_features, 1), in `dtype`."""
    return (weight.float() * scale).to(dtype)


def prepare_fp8(weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> Fp8Linear:
    """Raises ValueError for a weight of another dtype or of sizes that torch._scaled_mm cannot take."""
    out_features, in_features = weight.shape
    if weight.dtype != FP8:
        raise ValueError(f"a weight with a scale must be {FP8}, not {weight.dtype}")
    if out_features % MULTIPLE or in_features % MULTIPLE:
        raise ValueError(
            f"fp8 needs sizes that are multiples of {MULTIPLE}, and the weight's are {out_features} by {in_features}"
        )
    return Fp8Linear(weight.contiguous(), scale.float().view(1, out_features).contiguous(), bias)


def fp8_linear(x: torch.Tensor, weight: Fp8Linear) -> torch.Tensor:
    """x @ (weight * scale).T + bias with x rounded to fp8 row by row: (rows, in_features) -> (rows, out_features)."""
    quantized, scale = quantize_rows(x)
    if x.device.type == "cuda":
        # Row-wise scaling wants float32 scales of (rows, 1) and (1, out_features), the second matrix by columns, and
        # gives bfloat16. The bias is added here: it is float32 or float16 where the model is.
        y = torch._scaled_mm(
            quantized, weight.weight.t(), scale_a=scale, scale_b=weight.scale, out_dtype=torch.bfloat16
        ).to(x.dtype)
    else:
        y = ((quantized.float() @ weight.weight.float().T) * scale * weight.scale).to(x.dtype)
    return y if weight.bias is None else y.add_(weight.bias)
