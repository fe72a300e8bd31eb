"""JSON schemas: every answer under the masks of a schema's grammar validates, and errors name their place."""

from __future__ import annotations

import datetime
import enum
import json
import random
import time
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.output_format import OutputFormat, build
from tests.support.grammars import accepts, begins, byte_tokenizer, random_answer


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: str | None = None


class Person(BaseModel):
    """What pydantic makes of its types: $defs, $ref, anyOf, oneOf with a discriminator, const, formats, bounds."""

    name: str = Field(min_length=1, max_length=20)
    age: int = Field(ge=0, lt=130)
    code: str = Field(pattern=r"^\d{3}-[\dx]$")
    born: datetime.date
    seen: datetime.datetime
    colour: Colour
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    tags: list[str] = Field(max_length=3)
    position: tuple[float, float]
    key: uuid.UUID
    scores: dict[Literal["a", "b"], int]
    weights: dict[str, float] = {}


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


SCHEMAS: dict[str, Any] = {
    "person": Person.model_json_schema(),
    "tree": Tree.model_json_schema(),
    "any object": {"type": "object"},
    "anything": True,
    "two halves": {
        "allOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "either key": {"properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "a definition and more": {
        "$defs": {"A": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        "$ref": "#/$defs/A",
        "properties": {"b": {"const": 1}},
        "required": ["b"],
    },
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "string"}, {"type": "null"}],
    },
    "bounds of draft 4": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "maximum": 5,
    },
    "required, not listed": {"type": "object", "required": ["x"], "properties": {"y": {"const": 1}}},
    "no overlap": {"oneOf": [{"type": "string", "pattern": "^a+$"}, {"type": "integer"}]},
    "names by pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^x-"},
        "additionalProperties": {"type": "null"},
    },
    "an alternative that cannot be": {"anyOf": [{"type": "string", "pattern": "(?=a)b"}, {"type": "number"}]},
    "types": {"type": ["string", "null"], "maxLength": 5},
    "values": {"enum": ["a", 1, None, {"x": [1]}]},
    "by pointer": {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
}


def grammar_of(schema: Any, **options: Any) -> Grammar:
    return build(OutputFormat("json_schema", schema, "response_format.json_schema.schema", **options), byte_tokenizer())


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_validates(name: str) -> None:
    schema = SCHEMAS[name]
    grammar, rng = grammar_of(schema), random.Random(name)
    answers = [answer for _ in range(8) if (answer := random_answer(grammar, rng)) is not None]
    assert len(answers) >= 4
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema, format_checker=checker)
        if name == "person":
            Person.model_validate_json(answer)


@pytest.mark.parametrize(
    ("schema", "place", "says"),
    [
        ({"properties": {"age": {"type": "strin"}}}, ".properties.age.type", "'integer'"),
        (
            {"properties": {"age": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["age"]},
            ".properties.age",
            "minimum",
        ),
        ({"properties": {"age": {"$ref": "#/$defs/X"}}}, ".properties.age.$ref", "not in the schema"),
        ({"properties": {"age": {"$ref": "http://a/b"}}}, ".properties.age.$ref", "within the schema"),
        ({"items": {"not": {"type": "null"}}}, ".items.not", "not supported"),
        ({"prefixItems": [{"uniqueItems": True}]}, ".prefixItems[0].uniqueItems", "not supported"),
        ({"properties": {"a": {"type": "string", "pattern": "(("}}}, ".properties.a", "unclosed group"),
        ({"properties": {"a": {"pattern": "(?!a)"}}}, ".properties.a.pattern", "look-ahead"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"minLength": 3}]}}}, ".properties.a", "anyOf"),
        ({"$defs": {"A": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"}, ".$defs.A", "no text"),
        ({"$defs": {"X": {"items": {"pattern": "["}}}, "$ref": "#/$defs/X"}, ".$defs.X.items", "unclosed"),
        (5, "", "must be a JSON schema"),
        ("{", "", "not valid JSON"),
        ({"enum": []}, ".enum", "at least one"),
        ({"enum": [float("nan")]}, "", "not valid JSON"),
        ({"const": "\ud800"}, "", "not valid JSON"),
        ({"minimum": 10**400}, ".minimum", "cannot be enforced"),
        ({"multipleOf": 0}, ".multipleOf", "greater than 0"),
        ({"properties": 5}, ".properties", "a schema for each name"),
        ({"required": "a"}, ".required", "property names"),
        ({"enum": ["x" * 600_000]}, "", "at most"),
        ({"items": {"enum": [1, "x" * 20_000]}}, ".items.enum[1]", "at most 16384"),
        ({"const": {"a": "x" * 20_000}}, ".const", "at most 16384"),
        ({"type": "array", "items": {"const": 1}, "minItems": 10**6}, "", "too large"),
        ({"items": {"multipleOf": 999_999}}, ".items", "too large a multipleOf"),  # these three take minutes
        ({"items": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, ".items", "multipleOf, or too many"),
        ({"items": {"allOf": [{"pattern": f"a.*b{i}"} for i in range(50)]}}, ".items", "more than 16 patterns"),
    ],
)
def test_errors_name_their_place(schema: Any, place: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as caught:
        grammar_of(schema)
    assert caught.value.param == f"response_format.json_schema.schema{place}"
    assert caught.value.message.startswith(caught.value.param)


def test_a_schema_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        schema = {"properties": {"a": schema}}
    with pytest.raises(ParameterError, match="too deep"):
        grammar_of(schema)


def test_white_space_is_fixed_or_bounded() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
    assert accepts(grammar_of(schema), '{"a": 1, "b": 2}')
    assert not begins(grammar_of(schema), "{ ")
    compact = grammar_of(schema, whitespace="")
    assert accepts(compact, '{"a":1,"b":2}')
    loose = grammar_of(schema, whitespace=r"[\n ]*")
    assert accepts(loose, '{\n "a" : 1,\n "b": 2\n}')
    assert begins(loose, "{" + " " * 32)
    assert not begins(loose, "{" + " " * 33)
    with pytest.raises(ParameterError, match="guided_whitespace_pattern is 'x'"):
        grammar_of(schema, whitespace="x", whitespace_place="guided_whitespace_pattern")


def test_dates_are_those_of_the_calendar() -> None:
    grammar = grammar_of({"type": "string", "format": "date"})
    for text, valid in (("2024-02-29", True), ("2023-02-29", False), ("1900-02-29", False), ("2000-02-29", True)):
        assert accepts(grammar, f'"{text}"') is valid


def test_a_large_schema_takes_little_time() -> None:
    """Whoever sends it waits for it, and nobody else: the bound is wide, as CI's machines are slow."""
    part = {"properties": {"a": {"type": "string", "maxLength": 20}, "b": {"type": "integer", "minimum": 0}}}
    schema = {"properties": {f"p{i}": {"description": "x" * 100, **part} for i in range(500)}}
    assert len(json.dumps(schema)) > 100_000
    start = time.perf_counter()
    grammar_of(schema)
    assert time.perf_counter() - start < 2.0
