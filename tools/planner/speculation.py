"""The effect of drafting: expected tokens per step, and the acceptance rate that a number of tokens needs.

The acceptance rate a is the chance that a drafted token is accepted, given that those before it were, the same at every
position (arXiv 2211.17192, section 3.1). Real acceptance falls along a draft; a then is the one rate that gives the
same mean accepted length.
"""

from __future__ import annotations


def expected_tokens(acceptance: float, length: int) -> float:
    """Return the expected tokens of a sequence in a step that verifies `length` drafted tokens, the target's own one
    included.

    (1 - a^(k+1)) / (1 - a), equation 1 of arXiv 2211.17192; k + 1 for a = 1. Raises ValueError for a not in [0, 1].
    """
    if not 0.0 <= acceptance <= 1.0:
        raise ValueError(f"the acceptance rate is {acceptance}, but must be in [0, 1]")
    total, chance = 1.0, 1.0
    for _ in range(length):
        chance *= acceptance
        total += chance
    return total


def acceptance_for(tokens: float, length: int) -> float | None:
    """Return the acceptance rate at which a step that verifies `length` tokens gives `tokens`; None if none in [0, 1]
    does."""
    if not 1.0 <= tokens <= length + 1.0:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):  # expected_tokens grows with a
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, length) < tokens else (low, middle)
    return (low + high) / 2
