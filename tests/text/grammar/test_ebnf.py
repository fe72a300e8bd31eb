"""Context-free grammars: the schemas in them are checked as others are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.output_format import OutputFormat, build
from tests.support.grammars import accepts, byte_tokenizer


def grammar_of(text: str) -> Any:
    return build(OutputFormat("grammar", text, "grammar"), byte_tokenizer())


def test_a_schema_in_lark_is_enforced_as_elsewhere() -> None:
    schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    grammar = grammar_of(f'start: "a" %json {json.dumps(schema)} | "b" %json\n{{"const": "%json {{"}}')
    assert accepts(grammar, "a0.25")
    assert not accepts(grammar, "a0")
    assert accepts(grammar, 'b"%json {"')


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ('start: %json {"type": "integer", "minimum": -9223372036854775807, "maximum": -9223372036854775805}',
         "grammar.%json.maximum", "cannot be enforced"),  # has ended the process
        ('start: %json {"not": {}}', "grammar.%json.not", "not supported"),
        ("start: %json {", "grammar", "valid JSON schema"),
        ("start: %json", "grammar", "valid JSON schema"),
        ("start: /a{1000000}/", "grammar", "too large"),
    ],
)  # fmt: skip
def test_errors_name_their_place(text: str, place: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as caught:
        grammar_of(text)
    assert caught.value.param == place
