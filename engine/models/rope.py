"""Tables for rotary position embedding (arXiv 2104.09864), with its scalings for longer contexts."""

from __future__ import annotations

import math

import torch

from pilotfish.engine.models.config import RopeConfig
from pilotfish.errors import ModelError


def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """(max_position, head_dim) float32: for each position the cosines of its head_dim / 2 angles, then their sines.

    The angles are products of float32 position and float32 frequency, as Hugging Face computes them: a more exact table
    would differ from the one that models are trained with. Raises ModelError for an unknown scaling.
    """
    frequencies = inverse_frequencies(rope, head_dim)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """(head_dim / 2,) float32: radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":  # arXiv 2306.15595
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.kind != "default":
        raise ModelError(f"rope kind is {rope.kind!r}, but the engine knows 'default', 'linear' and 'llama3'")
    if rope.freq_factors is not None:
        if len(rope.freq_factors) != len(frequencies):
            raise ModelError(f"the model has {len(rope.freq_factors)} rope factors, but {len(frequencies)} frequencies")
        frequencies = frequencies / torch.tensor(rope.freq_factors, dtype=torch.float32)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1's scaling, as in Meta's llama-models reference: frequencies with few rotations in the original context
    are lowered by `factor`, those with many stay, and those between are interpolated."""
    rotations = rope.original_max_position / (2 * math.pi / frequencies)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies
