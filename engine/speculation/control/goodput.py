"""The worth of a step's drafts, in tokens. No drafters, costs or learning here.

It is not quite the sum over the sequences: eight more tokens for one of sixteen lengthen the step for all of them, and
the other fifteen wait. It is a power mean of the tokens that each sequence expects (Mo, Walrand 2000: alpha-fairness).
For one sequence, or where all expect the same, that is the sum; else tokens deep in one draft count for a little less
than another's first.

Lists, not arrays: a step has some dozens of numbers, and after a model's pass, which evicts everything else from the
processor's caches, each call of an array library takes longer than a loop over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from functools import cache

MOST_EVEN, LEAST_EVEN = 0.4, 0.8


@cache
def evenness(decoding: int) -> float:
    """Return the mean's exponent for so many sequences: at 1 only the sum counts, towards 0 the product.

    It is 0.8 up to six sequences and 0.4 from sixteen on: the more there are, the more of them wait for one long draft,
    and the likelier it is that one of them has no drafts and ends last.
    """
    octaves = math.log2(min(16, max(6, decoding)) / 6) / math.log2(16 / 6)
    return LEAST_EVEN - (LEAST_EVEN - MOST_EVEN) * octaves


def gains(decoding: int, chances: Iterable[float]) -> list[float]:
    """Return what each token of a draft adds to the power of its sequence's expected tokens, given the chances that it
    and those before it are right; not increasing."""
    exponent = evenness(decoding)
    gained = []
    expected = power = 1.0
    for chance in chances:
        expected += chance
        before, power = power, expected**exponent
        gained.append(power - before)
    return gained


def worth(decoding: int, gained: float) -> float:
    """Return the tokens that a step of `decoding` sequences is worth if drafts add `gained` to the sum of the powers;
    `decoding` itself without drafts."""
    return decoding * float((1.0 + gained / decoding) ** (1 / evenness(decoding)))


def goodputs(decoding: int, gained: Iterable[float], seconds: Seq[float]) -> list[float]:
    """Return the worth per second of a step with the first 0, 1, 2, ... of the tokens that add `gained` each.
    `seconds`: the step's with as many tokens, one more than there are tokens."""
    total, found = 0.0, [decoding / seconds[0]]
    for gain, taken in zip(gained, seconds[1:], strict=True):
        total += gain
        found.append(worth(decoding, total) / taken)
    return found
