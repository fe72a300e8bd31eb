"""What the drafts of a step are worth, in tokens. No drafters, no costs, no learning here.

Not quite the sum over the sequences: eight more tokens for one of sixteen lengthen the step for all of them, while the
other fifteen wait. What counts is a power mean of what each sequence expects (Mo, Walrand 2000: alpha-fairness). For
one sequence, or where all expect the same, that is the sum; else tokens deep in one's draft count for a little less
than another's first.
"""

from __future__ import annotations

import numpy as np

EVEN = 0.8
"""The mean's exponent: at 1 the sum alone counts, towards 0 the product."""


def gains(chances: np.ndarray) -> np.ndarray:
    """What each drafted token adds to the power of what its sequence expects, (..., longest) float64, from the chances
    that it and those before it are right; not increasing along a draft."""
    powers = (chances.cumsum(axis=-1) + 1.0) ** EVEN
    gained = powers.copy()
    gained[..., 1:] -= powers[..., :-1]
    gained[..., 0] -= 1.0
    return gained


def worth(decoding: int, gained: np.ndarray) -> np.ndarray:
    """Tokens that a step of `decoding` sequences is worth in which the powers of what they expect grow by `gained`
    together: `decoding` itself where there are no drafts."""
    tokens: np.ndarray = decoding * (1.0 + gained / decoding) ** (1 / EVEN)
    return tokens


def best_first(chances: np.ndarray) -> np.ndarray:
    """What a plan's tokens gain, all drafts of it together, if the best of them are taken first: (plans, turns,
    longest) chances; (plans, turns * longest), the sums so far."""
    gained = gains(chances).reshape(len(chances), -1)
    if chances.shape[1] > 1:
        gained = -np.sort(-gained, axis=1)
    return gained.cumsum(axis=1)
