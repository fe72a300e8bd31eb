"""What the drafts of a step are worth, in tokens. No drafters, no costs, no learning here.

Not quite the sum over the sequences: eight more tokens for one of sixteen lengthen the step for all of them, while the
other fifteen wait. What counts is a power mean of what each sequence expects (Mo, Walrand 2000: alpha-fairness). For
one sequence, or where all expect the same, that is the sum; else tokens deep in one's draft count for a little less
than another's first.

Lists, not arrays: a step has some dozens of numbers, and after a model's pass, which leaves nothing else in the
processor's caches, each call of an array library takes longer than going through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from functools import cache

MOST_EVEN, LEAST_EVEN = 0.4, 0.8


@cache
def evenness(decoding: int) -> float:
    """The mean's exponent for so many sequences: at 1 the sum alone counts, towards 0 the product.

    The more there are, the more wait for one's long draft, and the surer one is among them that has none and is done
    last: 0.8 up to six, 0.4 from sixteen on.
    """
    octaves = math.log2(min(16, max(6, decoding)) / 6) / math.log2(16 / 6)
    return LEAST_EVEN - (LEAST_EVEN - MOST_EVEN) * octaves


def gains(decoding: int, chances: Iterable[float]) -> list[float]:
    """What each token of a draft adds to the power of what its sequence, one of so many, expects, from the chances
    that it and those before it are right; not increasing."""
    exponent = evenness(decoding)
    gained = []
    expected = power = 1.0
    for chance in chances:
        expected += chance
        before, power = power, expected**exponent
        gained.append(power - before)
    return gained


def worth(decoding: int, gained: float) -> float:
    """Tokens that a step of `decoding` sequences is worth in which the powers of what they expect grow by `gained`
    together: `decoding` itself where there are no drafts."""
    return decoding * float((1.0 + gained / decoding) ** (1 / evenness(decoding)))


def goodputs(decoding: int, gained: Iterable[float], seconds: Seq[float]) -> list[float]:
    """Worth by second of a step with 0, 1, 2, ... of the tokens that gain so much each, in this order, which then takes
    the first, the second, ... of `seconds`: one more than there are tokens."""
    total, found = 0.0, [decoding / seconds[0]]
    for gain, taken in zip(gained, seconds[1:], strict=True):
        total += gain
        found.append(worth(decoding, total) / taken)
    return found
