"""Weights in fp8: from a checkpoint's tensors to plain ones and back. What fp8 is, is `engine.kernels.fp8`'s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pilotfish.engine.kernels.fp8 import FP8, dequantize, quantize_rows
from pilotfish.engine.weights.hf_quantization import is_quantizable

SCALE = "_scale"
"""What the name of a weight's scales ends in after the weight's own name: (out_features, 1) float32, weight times scale
being the matrix. In a sequence of tensors the scales come right after their weight."""


def dequantized(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights with every matrix in `dtype`, and no scales among them."""
    waiting: tuple[str, torch.Tensor] | None = None
    for name, tensor in weights:
        if tensor.dtype == FP8:
            waiting = name, tensor
        elif waiting is not None and name == waiting[0] + SCALE:
            yield waiting[0], dequantize(waiting[1], tensor, dtype)
            waiting = None
        else:
            yield name, tensor


def quantized(
    weights: Iterable[tuple[str, torch.Tensor]], unquantized: tuple[str, ...], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights with the layers' matrices in fp8, each followed by its scales, computed on `device`.

    Embedding, head and norms stay as they are, matrices of the modules `unquantized` (see `Fp8Config`), too, and what
    is in fp8 already.
    """
    for name, tensor in weights:
        if tensor.dtype == FP8 or not is_quantizable(name, unquantized):
            yield name, tensor
            continue
        weight, scale = quantize_rows(tensor.to(device))  # a row of a weight is an output channel
        yield name, weight
        yield name + SCALE, scale
