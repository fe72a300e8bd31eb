"""Matrix products in 8-bit floating point (float8_e4m3fn of OCP's specification, arXiv 2209.05433).

A weight has a scale for each output channel, fixed at loading; an activation has one for each row (token), computed at
run time. On CUDA the product is torch._scaled_mm's with row-wise scales; elsewhere it is the same arithmetic in
float32, the reference that the former is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pilotfish.engine.weights.fp8 import SCHEME, quantize


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


def prepare_fp8(weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> Fp8Linear:
    """Prepare a weight in fp8. Raises ValueError for another dtype, or for sizes that torch._scaled_mm cannot take."""
    out_features, in_features = weight.shape
    if weight.dtype != SCHEME.dtype:
        raise ValueError(f"a weight with a scale must be {SCHEME.dtype}, not {weight.dtype}")
    if out_features % (multiple := SCHEME.multiple) or in_features % multiple:
        raise ValueError(
            f"fp8 needs sizes that are multiples of {multiple}, and the weight's are {out_features} by {in_features}"
        )
    return Fp8Linear(weight.contiguous(), scale.float().view(1, out_features).contiguous(), bias)


def fp8_linear(x: torch.Tensor, weight: Fp8Linear) -> torch.Tensor:
    """x @ (weight * scale).T + bias with x rounded to fp8 row by row: (rows, in_features) -> (rows, out_features)."""
    return multiply(*quantize(x), weight, x.dtype)


def multiply(quantized: torch.Tensor, scale: torch.Tensor, weight: Fp8Linear, dtype: torch.dtype) -> torch.Tensor:
    """(quantized * scale) @ (weight * scale).T + bias in `dtype`: (rows, in_features) float8_e4m3fn with scales (rows,
    1) float32 -> (rows, out_features)."""
    if quantized.device.type == "cuda":
        # Row-wise scaling wants float32 scales of (rows, 1) and (1, out_features), the second matrix by columns, and
        # gives bfloat16. The bias is added here: it is float32 or float16 where the model is.
        y = torch._scaled_mm(
            quantized, weight.weight.t(), scale_a=scale, scale_b=weight.scale, out_dtype=torch.bfloat16
        ).to(dtype)
    else:
        y = ((quantized.float() @ weight.weight.float().T) * scale * weight.scale).to(dtype)
    return y if weight.bias is None else y.add_(weight.bias)
