"""Tables for rotary position embedding (arXiv 2104.09864), with its scalings for longer contexts.

The scalings are those of transformers' modeling_rope_utils.py, under its names. A table is the same for every sequence,
so that a text does not depend on what else is served: longrope and dynamic scaling, which transformers applies by the
length of the sequence at hand, go by the longest context that the engine serves.
"""

from __future__ import annotations

import math

import torch

from pilotfish.engine.models.config import RopeConfig
from pilotfish.errors import ModelError

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "none")


def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """(max_position, head_dim) float32: for each position the cosines of its head_dim / 2 angles, then their sines.

    The angles are products of float32 position and float32 frequency, as Hugging Face computes them: a more exact table
    would differ from the one that models are trained with. Dimensions that are not rotated have the angle 0; they are
    the last of each half (see `rotated_first`). Raises ModelError for an unknown scaling.
    """
    frequencies = inverse_frequencies(rope, head_dim, max_position)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies
    factor = rope.attention_factor
    still = head_dim // 2 - len(frequencies)
    cosines, sines = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cosines, cosines.new_ones(max_position, still), sines, sines.new_zeros(max_position, still)), 1)


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int = 0) -> torch.Tensor:
    """(half of the rotated dimensions,) float32: radians per position, in contexts of up to `max_position`."""
    dim = 0 if rope.kind == "none" else rope.rotated(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    base = _stretched(rope, dim, max_position) if rope.kind == "dynamic" else rope.theta
    frequencies = 1.0 / (base**exponents)
    if rope.kind == "linear":  # arXiv 2306.15595
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, dim)
    elif rope.kind not in KINDS:
        raise ModelError(f"rope kind is {rope.kind!r}, but the engine knows {', '.join(map(repr, KINDS))}")
    factors = rope.long_factors if rope.long_factors and max_position > rope.original_max_position else None
    if factors := factors or rope.freq_factors:
        if len(factors) != len(frequencies):
            raise ModelError(f"the model has {len(factors)} rope factors, but {len(frequencies)} frequencies")
        if rope.kind == "longrope":  # arXiv 2402.13753
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float32)
    return frequencies


def rotated_first(head_dim: int, rotated: int) -> torch.Tensor:
    """(head_dim,) int64: the order of a head's dimensions in which the pairs of the first `rotated`, which are rotated
    together, lie half a head apart. Scores do not depend on the order, if queries and keys have the same."""
    turned, still = torch.arange(rotated).view(2, -1), torch.arange(rotated, head_dim).view(2, -1)
    return torch.cat((turned, still), dim=1).flatten()


def _stretched(rope: RopeConfig, dim: int, max_position: int) -> float:
    """The base of dynamic NTK scaling, for contexts of `max_position`."""
    length = max(max_position, rope.original_max_position)
    stretch: float = (rope.factor * length / rope.original_max_position - (rope.factor - 1)) ** (dim / (dim - 2))
    return rope.theta * stretch


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1's scaling, as in Meta's llama-models reference: frequencies with few rotations in the original context
    are lowered by `factor`, those with many stay, and those between are interpolated."""
    rotations = rope.original_max_position / (2 * math.pi / frequencies)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): as llama3's, but interpolated by the number of the dimension."""

    def dimension(rotations: float) -> float:
        return (dim * math.log(rope.original_max_position / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    periods = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
