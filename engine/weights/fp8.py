"""Weights in 8-bit floating point (float8_e4m3fn, arXiv 2209.05433), with a scale for each output channel.

It reads the three formats in which fp8 checkpoints of Llama 3.1 are published, all with a `weight_scale` beside each
weight:

- "fbgemm_fp8", Meta's own: a scale for each output channel (transformers, integrations/fbgemm_fp8.py);
- "compressed-tensors" with 8-bit floats, llm-compressor's: a scale for each output channel or for the whole matrix
  (https://github.com/vllm-project/compressed-tensors);
- "fp8", AutoFP8's: a scale for the whole matrix (https://github.com/neuralmagic/AutoFP8).

Activations get a scale for each row, whatever static scale the checkpoint has. `engine.kernels.fp8` multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pilotfish.engine.weights.scheme import Scheme

if TYPE_CHECKING:
    import torch

LARGEST = 448.0
"""The largest number in float8_e4m3fn."""

_TINY = 1e-12
"""Lower bound of a row's largest number, so that the scale of a row of zeros is not 0."""


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Scheme.quantize`. A row's largest number becomes 448. Activations are quantized in the same way."""
    import torch

    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_(min=_TINY).div_(LARGEST)
    # Clamped, because the division may round up past the largest number, which becomes NaN on some devices.
    return (x / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def modules_left(found: Mapping[str, Any]) -> tuple[str, ...] | None:
    """See `Scheme.modules_left`."""
    method = found.get("quant_method")
    if method == "fbgemm_fp8":
        return tuple(found.get("modules_to_not_convert") or ())
    if method == "fp8":
        if found.get("weight_block_size"):
            raise ValueError("fp8 with scales for blocks of a matrix (weight_block_size)")
        return tuple(found.get("ignored_layers") or found.get("modules_to_not_convert") or ("lm_head",))
    groups = (found.get("config_groups") or {}).values()
    if method == "compressed-tensors" and all(_is_fp8(group.get("weights") or {}) for group in groups):
        return tuple(found.get("ignore") or ())
    return None


def _is_fp8(weights: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors' description is of fp8 weights that the engine can read."""
    by = weights.get("strategy") in ("tensor", "channel") and weights.get("symmetric", True)
    return by and (weights.get("type"), weights.get("num_bits")) == ("float", 8)


SCHEME = Scheme(
    name="fp8",
    storage="float8_e4m3fn",
    safetensors="F8_E4M3",
    bytes=1,
    quantize=quantize,
    multiple=16,  # torch._scaled_mm's rule on CUDA
    kernels=("torch",),
    capability=(8, 9),  # Ada; Hopper and Blackwell follow
    arithmetic="fp8",
    modules_left=modules_left,
    checkpoints="fbgemm_fp8, fp8 (AutoFP8) and compressed-tensors with 8-bit floats",
    # Static scales of activations and of a KV cache.
    unused=("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale"),
)
