"""Bounds of numbers: what a grammar allows validates, at the bounds themselves, too."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.output_format import json_schema
from tests.support.grammars import accepts, byte_tokenizer

LOW, HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
NUMBERS = st.one_of(st.integers(-12, 12), st.sampled_from([-2.75, -0.5, -1e-5, 1e-20, 1e-5, 0.01, 0.3, 0.5, 1.5, 10.5]))


def spellings(number: float) -> list[str]:
    plain = format(Decimal(repr(number)), "f")
    return [plain, f"{plain}0" if "." in plain else f"{plain}.0", f"-{plain}" if number == 0 else plain]


@given(low=NUMBERS, high=NUMBERS, keys=st.tuples(st.sampled_from(LOW), st.sampled_from(HIGH)), integer=st.booleans())
@example(0, 0.5, ("exclusiveMinimum", "maximum"), False)
@example(-2.75, -2, ("minimum", "exclusiveMaximum"), False)
@example(0, 1e-20, ("exclusiveMinimum", "exclusiveMaximum"), False)
@settings(max_examples=60)
def test_what_is_allowed_validates(low: float, high: float, keys: tuple[str, str], integer: bool) -> None:
    schema = {"type": "integer" if integer else "number", keys[0]: low, keys[1]: high}
    valid = jsonschema.Draft202012Validator(schema).is_valid
    try:
        grammar = json_schema(schema, "schema", byte_tokenizer())
    except ParameterError:  # nothing is between them, or next to nothing
        assert high - low < 1e-9 or (integer and not any(valid(number) for number in range(-13, 14)))
        return
    middle = (low + high) / 2
    numbers = {low, high, middle, *(number for number in range(-13, 14) if low - 1 <= number <= high + 1)}
    for number in numbers:
        for text in spellings(number):
            if accepts(grammar, text):
                assert valid(json.loads(text)), text
    if not integer and high - low > 1e-6:
        assert accepts(grammar, spellings(middle)[0])
    if integer:
        assert all(accepts(grammar, str(number)) for number in range(-13, 14) if valid(number))


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    ("bounds", "place"),
    [
        ({"minimum": 2**63}, "minimum"),
        ({"maximum": -(2**63) - 5, "minimum": -(2**63) - 9}, "maximum"),  # has ended the process
        ({"minimum": 2**53 + 1, "maximum": 2**53 + 1}, "minimum"),
        ({"exclusiveMinimum": 2**53 - 1}, "exclusiveMinimum"),
        ({"minimum": 1e300}, "minimum"),
    ],
)
def test_numbers_that_are_not_exact_are_refused(kind: str, bounds: dict[str, Any], place: str) -> None:
    with pytest.raises(ParameterError, match="cannot be enforced") as caught:
        json_schema({"properties": {"n": {"type": kind, **bounds}}}, "schema", byte_tokenizer())
    assert caught.value.param == f"schema.properties.n.{place}"


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_of_whole_words_are_as_good_as_none(kind: str) -> None:
    schema = {"type": kind, "minimum": -(2**63), "maximum": 2**64 - 1}
    grammar = json_schema(schema, "schema", byte_tokenizer())
    assert accepts(grammar, str(2**53 - 1))
    assert accepts(grammar, str(1 - 2**53))
    assert not accepts(grammar, str(2**64))
