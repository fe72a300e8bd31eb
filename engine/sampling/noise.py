"""Noise that is a function of a seed, a position in the sequence, a token id, and a stream.

There is no generator and no state: the noise at a position is the same in any batch and at any time. How tokens
are drawn with it is in `sampler` and `engine.verification`.

Two counter-based mixes. A row's key is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) over seed, stream and position. The noise of its tokens is triple32, a 32-bit finalizer of
hash-prospector (Wellons, https://github.com/skeeto/hash-prospector), over the token id, with one half of the row's key
mixed in before the first multiplication and the other before the second: 32-bit words, because vector units multiply
those several times as fast as 64-bit ones.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device import on_device

DRAW = 0
"""Stream of the noise that draws a token from a distribution: the target's, and a drafter's own."""
ACCEPT = 1
"""Stream of the uniforms that accept or reject a drafted token (rejection verification only)."""
RESIDUAL = 2
"""Stream of the noise that draws from a residual (rejection verification only)."""

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_STREAM = 0xD1B54A32D192ED03  # odd, and no multiple of _GOLDEN that a position or a request's seeds would reach

# triple32's multipliers, as signed words
_TRIPLE_1 = 0xED5AD4BB - (1 << 32)
_TRIPLE_2 = 0xAC4C1B51 - (1 << 32)
_TRIPLE_3 = 0x31848BAB


def row_key(seed: int, position: int, stream: int = DRAW) -> int:
    """Return the key of a row of noise, 0 to 2**64 - 1.

    seed: any 64 bits, signed or not; position: index, in tokens from the start of the prompt, of the token drawn.
    """
    key = _mix64(seed & _MASK)
    key = _mix64(key + (stream + 1) * _STREAM & _MASK)
    return _mix64(key + (position + 1) * _GOLDEN & _MASK)


def row_keys(seeds: Seq[int], positions: np.ndarray, stream: int = DRAW) -> np.ndarray:
    """Return `row_key` of each row, as `as_int64` gives them: (rows,) int64."""
    # Cheaper one by one while there are few.
    if len(seeds) < 8:
        return as_int64(
            [row_key(seed, position, stream) for seed, position in zip(seeds, positions.tolist(), strict=True)]
        )
    key = _mix64_of_all(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    key = _mix64_of_all(key + np.uint64((stream + 1) * _STREAM & _MASK))
    return _mix64_of_all(key + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)).view(np.int64)


def as_int64(keys: Seq[int]) -> np.ndarray:
    """Return keys of `row_key` as words with a sign, the same bits: (rows,) int64."""
    return np.array(keys, dtype=np.uint64).view(np.int64)


def uniform(key: int) -> float:
    """Return a number in [0, 1) of 53 random bits."""
    return (_mix64(key + _GOLDEN & _MASK) >> 11) * 2.0**-53


def key_halves(keys: Seq[int]) -> np.ndarray:
    """Return the upper and the lower 32 bits of each key, as `log_exponential` takes them: (2, rows) int32."""
    both = np.array(keys, dtype=np.uint64)
    return np.stack([both >> np.uint64(32), both & np.uint64(0xFFFFFFFF)]).astype(np.uint32).view(np.int32)


def log_exponential(keys: Seq[int] | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log E, E an independent exponential variable of rate 1 for each (key, token): float32, between -22.2 and 2.9.

    Its negative is standard Gumbel noise: argmax(log p - log E) = argmax(p / E) is a draw from p.

    keys: one `row_key` for each row, or their `key_halves` on the device of `tokens`; tokens: token ids of each row,
    (rows, count), or of all, (1, count); any integer type. -> (rows, count) on the device of `tokens`.
    """
    m = _bits31(keys, tokens)
    # v = (m + 1/2) / 2**31 to float32's relative precision, so fine where E is small and a token may win. The factor is
    # a hair less than 2**-31 since the largest m round up to 2**31, and 1 - v must stay above 0.
    v = m.to(torch.float32).mul_(-(2.0**-31) * (1 - 2.0**-24)).sub_(2.0**-32)
    return v.log1p_().neg_().log_()


def gumbel_race(logits: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Draw a token of the whole vocabulary for each row, argmax(logit - log E): logits (rows, vocab), -inf for what may
    not be drawn; halves (2, rows) of the rows' keys -> (rows,) int64."""
    tokens = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device).unsqueeze(0)
    noise = log_exponential(halves, tokens)
    return torch.sub(logits, noise, out=noise).argmax(1)


def _bits31(keys: Seq[int] | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return 31 random bits for each (key, token): int32, not negative."""
    halves = keys if isinstance(keys, torch.Tensor) else on_device(torch.from_numpy(key_halves(keys)), tokens.device)
    high, low = halves.unsqueeze(2)  # (rows, 1) each
    z = torch.bitwise_xor(tokens.to(torch.int32), low)
    spare = torch.empty_like(z)
    z.mul_(_TRIPLE_1)
    z.bitwise_xor_(torch.bitwise_right_shift(z, 11, out=spare).bitwise_and_((1 << 21) - 1))
    z.add_(high).mul_(_TRIPLE_2)
    z.bitwise_xor_(torch.bitwise_right_shift(z, 15, out=spare).bitwise_and_((1 << 17) - 1))
    z.mul_(_TRIPLE_3)
    # An arithmetic shift here clears the sign and, whatever the sign was, maps the other 31 bits one to one.
    return z.bitwise_xor_(torch.bitwise_right_shift(z, 14, out=spare))


def _mix64_of_all(z: np.ndarray) -> np.ndarray:
    """`_mix64` of uint64 numbers, whose products wrap around."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ z >> np.uint64(31)
    return mixed


def _mix64(z: int) -> int:
    """Apply SplitMix64's finalizer to a number from 0 to 2**64 - 1."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
