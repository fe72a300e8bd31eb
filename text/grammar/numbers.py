"""Bounds of numbers in JSON schemas, written so that llguidance enforces them.

It computes with doubles, ends the process on some integers near -2**63, and takes a bare integer for more than the
exclusive bound that it is (`{"exclusiveMinimum": 0, "maximum": 0.5}` would allow 0). What is written here allows the
same numbers or fewer, never others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from pilotfish.errors import shown

LARGEST = 2**53 - 1
"""Up to here integers are exact as doubles."""
STEP = 1e-9
"""How far from an exclusive bound numbers begin, beside which there is no other bound."""
PARTS = 1000
"""Which part of the distance to the other bound it is at most."""

MOST_REMAINDERS = 200_000
"""Of a multipleOf, in units of its last digit: it is followed by an automaton of the remainders."""
MOST_ODD_REMAINDERS = 10_000
"""Of its part without factors 2 and 5, which take no time."""
MOST_DIGITS = 30

_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_EXCLUSIVE = (_LOW[1], _HIGH[1])


def narrow(schema: dict[str, Any]) -> tuple[str, str] | None:
    """Rewrite the bounds of a schema in place. Returns the keyword and the problem of a bound that cannot be enforced,
    or None."""
    for sign, keys in ((1, _LOW), (-1, _HIGH)):
        for key in keys:
            value = schema.get(key)
            if value is None:
                continue
            if sign * value > LARGEST - (key in _EXCLUSIVE):
                return key, f"is {shown(value)}, but numbers beyond {sign * LARGEST} cannot be enforced"
            if sign * value < -LARGEST:
                schema[key] = -sign * LARGEST
    if schema.get("type") == "integer":
        return None
    for sign, (inclusive, exclusive), others in ((1, _LOW, _HIGH), (-1, _HIGH, _LOW)):
        bound = schema.get(exclusive)
        if bound is None or bound != int(bound):
            continue
        spans = [sign * (schema[key] - bound) for key in others if key in schema]
        step = min([STEP, *(span / PARTS for span in spans)])
        inner = bound + sign * max(step, abs(bound) * 1e-15)
        if step <= 0 or any(sign * (inner - bound) >= span for span in spans):
            return exclusive, f"is {bound}, but leaves no number that could be told from it"
        del schema[exclusive]
        known = schema.get(inclusive)
        schema[inclusive] = inner if known is None else (max if sign > 0 else min)(known, inner)
    return None


def feasible(multiples: Iterable[Decimal]) -> bool:
    """Whether the automaton of the numbers that are multiples of all of these is made in less than a second."""
    numbers = list(multiples)
    if not numbers:
        return True
    unit = min(int(number.as_tuple().exponent) for number in numbers)
    if unit < -MOST_DIGITS or max(number.adjusted() for number in numbers) > MOST_DIGITS:
        return True  # llguidance refuses it
    common = math.lcm(*(int(number.scaleb(-unit)) for number in numbers))
    odd = common
    for factor in (2, 5):
        while odd % factor == 0:
            odd //= factor
    return odd == 1 or (odd <= MOST_ODD_REMAINDERS and common <= MOST_REMAINDERS)
