"""Values that are written as text, with a tag around each: what they are in JSON, and what holds them to a schema."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import ParameterError
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.formats.registry import CALL_FORMATS
from pilotfish.text.formats.tagged_calls import as_json
from pilotfish.text.message import AssistantMessage, Tool
from tests.support.grammars import accepts, begins
from tests.text.formats.test_formats import cut, schema

FORMATS = {name: MessageFormat(calls=CALL_FORMATS[name], special={}) for name in ("qwen3_coder", "glm45")}


@pytest.mark.parametrize(
    ("text", "of", "value"),
    [
        ("7", {"type": "string"}, "7"),
        ("7", {"type": "integer"}, 7),
        ("7", {}, 7),
        ("7", None, 7),
        ("NaN", None, "NaN"),
        ("[Infinity]", {"type": "array"}, "[Infinity]"),
        ("a b", None, "a b"),
        (" a\n", {"type": "string"}, " a\n"),
        ('"a"', {"type": "string"}, '"a"'),
        ("True", {"type": "boolean"}, True),
        ("None", {"type": ["integer", "null"]}, None),
        ("{'a': 1}", {"type": "object"}, {"a": 1}),
        ("nonsense", {"type": "object"}, "nonsense"),
        ("7", {"type": ["string", "integer"]}, 7),
        ("b", {"type": ["string", "null"]}, "b"),
        ("null", {"type": ["string", "null"]}, None),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("[1, 2]", {"$ref": "#/$defs/a"}, [1, 2]),
        ("\ud800", {"type": "string"}, "\ud800"),
    ],
)
def test_values(text: str, of: Any, value: Any) -> None:
    assert json.loads(as_json(text, of)) == value


TYPES: dict[str, Any] = {
    "string": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\n"), max_size=6),
    "integer": st.integers(),
    "object": st.dictionaries(st.text("ab", max_size=2), st.none() | st.booleans(), max_size=2),
}


@pytest.mark.parametrize("name", FORMATS)
@given(given=st.fixed_dictionaries({}, optional=TYPES), rng=st.randoms())
def test_arguments_come_back(name: str, given: dict[str, Any], rng: random.Random) -> None:
    form = FORMATS[name]
    properties = {kind: {"type": kind} for kind in TYPES}
    tool = Tool(name="f", parameters={"type": "object", "properties": properties})
    text = form.written_calls([("f", given)])
    parser, message = form.parser([tool]), AssistantMessage()
    message.add([part for piece in cut(text, rng) for part in parser.feed(piece)] + list(parser.finish()))
    assert [json.loads(call.arguments) for call in message.calls] == [given]
    if list(given) == sorted(given, key=list(TYPES).index):  # in the schema's order
        grammar = form.grammar([tool], "required", schema=schema)
        assert grammar is not None
        assert accepts(grammar, text)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_schema_asks_of_strings(name: str) -> None:
    form = FORMATS[name]

    def made(of: Any, strict: bool = True) -> Any:
        parameters = {"type": "object", "properties": {"a": of}, "required": ["a"]}
        grammar = form.grammar([Tool(name="f", parameters=parameters, strict=strict)], "required", schema=schema)
        assert grammar is not None
        return grammar

    def written(value: str) -> str:
        return form.written_calls([("f", {"a": value})])

    for value, fits in (("", False), ("ab", True), ("abcde", False)):
        assert accepts(made({"type": "string", "minLength": 1, "maxLength": 4}), written(value)) == fits
    for value, fits in (("red", True), ("blue", False)):
        assert accepts(made({"enum": ["red", "green"]}), written(value)) == fits
    assert not begins(made({"type": "string"}), form.written_calls([("f", {"b": 1})])[:-12])
    pattern = {"type": "string", "pattern": "^a+$"}
    assert accepts(made(pattern, strict=False), written("b"))
    with pytest.raises(ParameterError) as caught:
        made(pattern)
    assert caught.value.param == "tools[0].function.parameters.properties.a.pattern"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "<tool_call>\nno function"),
        ("glm45", "<tool_call>no name here\n<arg_key>a"),
        ("kimi_k2", "<|tool_calls_section_begin|>nothing"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>no sep<｜tool▁call▁end｜>"),
    ],
)
def test_what_is_no_call_stays_content(name: str, text: str) -> None:
    parser, message = MessageFormat(calls=CALL_FORMATS[name], special={}).parser([Tool(name="f")]), AssistantMessage()
    message.add([part for char in text for part in parser.feed(char)] + list(parser.finish()))
    assert message == AssistantMessage(content=text)
