"""Regular expressions, choices, context-free grammars, structural tags, and grammars put together."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pilotfish.errors import ParameterError
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.output_format import Kind, OutputFormat, build
from tests.support.grammars import THINK_END, accepts, begins, byte_tokenizer, matcher_of, random_answer

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GBNF = r"""
root ::= "SELECT " column " from " table ws  # the query
column ::= "a" | "b"
table ::= [a-z]+
ws ::= [ \n]*
"""
OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<function=f>", "schema": OBJECT, "end": "</function>"},
        {"begin": "<function=g>", "schema": {"const": 1}, "end": "</function>"},
    ],
    "triggers": ["<function="],
}
THOUGHT = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
            {"type": "json_schema", "json_schema": OBJECT},
        ],
    },
}
SEPARATED = {
    "format": {
        "type": "tags_with_separator",
        "separator": ",",
        "at_least_one": True,
        "tags": [{"begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]+"}, "end": "</n>"}],
    }
}
CASES: list[tuple[Kind, Any, list[str], list[str]]] = [
    ("regex", "^ab/c$", ["ab/c"], ["ab", "ab/cd"]),
    ("regex", r"\d{3}[^\d]", ["123x"], ["١٢٣x", "1234"]),
    ("choice", ["a", "ab", 'é"\n'], ["a", "ab", 'é"\n'], ["b", "abc"]),
    (
        "grammar",
        GBNF,
        ["SELECT a from t", "SELECT b from xy" + " " * 32],
        ["SELECT c from t", "SELECT a from t" + " " * 33],
    ),
    ("grammar", 'start: "a" | B\nB: /[0-9]+/', ["a", "12"], ["a1"]),
    (
        "structural_tag",
        OLDER,
        ["plain", 'x <function=f>{"a": 1}</function> y <function=g>1</function>'],
        ["<function=h>1</function>", "<function=g>2</function>", "<function=f>"],
    ),
    ("structural_tag", THOUGHT, ['<think>hm {"</think>{"a": 1}'], ["<think>hm", '{"a": 1}']),
    ("structural_tag", SEPARATED, ["<n>1</n>", "<n>1</n>,<n>2</n>"], ["", "<n>1</n>,"]),
]


@pytest.mark.parametrize(("kind", "value", "inside", "outside"), CASES)
def test_what_a_format_allows(kind: Kind, value: Any, inside: list[str], outside: list[str]) -> None:
    grammar = build(OutputFormat(kind, value, "x"), byte_tokenizer())
    assert [text for text in inside if not accepts(grammar, text)] == []
    assert [text for text in outside if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("kind", "value", "place", "says"),
    [
        ("regex", "(?=a)", "x", "look-around"),
        ("regex", "((", "x", "unclosed group"),
        ("regex", 5, "x", "regular expression"),
        ("choice", [], "x", "list of strings"),
        ("choice", ["\ud800"], "x", "cannot be compiled"),
        ("grammar", "root ::= x", "x", "'x' not found"),
        ("grammar", "start: @nope", "x", "unknown grammar"),
        ("grammar", "start: <|nope|>", "x", "unknown special token"),
        ("structural_tag", {"format": {"type": "tagg"}}, "x.format", "'triggered_tags'"),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [{"type": "tag"}]}},
            "x.format.elements[0].begin",
            "string",
        ),
        ("structural_tag", OLDER | {"triggers": ["<call>"]}, "x.tags[0].begin", "one of the triggers"),
        (
            "structural_tag",
            {"format": {"type": "json_schema", "json_schema": {"items": {"type": 1}}}},
            "x.format.json_schema.items.type",
            "must be one of",
        ),
        ("structural_tag", "[", "x", "not valid JSON"),
    ],
)
def test_errors_name_their_place(kind: Kind, value: Any, place: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as caught:
        build(OutputFormat(kind, value, "x"), byte_tokenizer())
    assert caught.value.param == place


def object_grammar() -> Any:
    return build(OutputFormat("json_schema", OBJECT, "x"), byte_tokenizer())


def test_an_answer_after_reasoning_by_text() -> None:
    grammar = compose.after_reasoning(object_grammar(), "</think>")
    assert accepts(grammar, 'I <b>think</b> {"\n</think>\n\n{"a": 1}')
    assert not begins(grammar, "x</think>x")
    matcher = matcher_of(grammar)
    overrunning = [*b"x</thin", *b"k>", *b"{"]
    assert matcher.consume_tokens(overrunning)
    assert matcher.compute_ff_bytes() == b'"a": '


def test_an_answer_after_reasoning_by_token() -> None:
    grammar = compose.after_reasoning(object_grammar(), THINK_END, begin="<think>")
    matcher = matcher_of(grammar)
    assert matcher.consume_tokens([*b"<think>free", THINK_END, *b'{"a": 1}'])
    assert matcher.is_accepting()
    assert accepts(grammar, '{"a": 1}')


@pytest.mark.parametrize("parallel", [True, False])
def test_free_text_with_calls(parallel: bool) -> None:
    call = compose.sequence(object_grammar(), compose.literal("</call>"))
    grammar = compose.text_with_calls("<call>", call, parallel=parallel)
    once = 'Let me see. <call>{"a": 1}</call>'
    assert accepts(grammar, "no calls <cal")
    assert accepts(grammar, once)
    assert not begins(grammar, "x <call>x")
    assert accepts(grammar, f"{once} and {once}") is parallel


def test_repetitions_and_their_bounds() -> None:
    grammar = compose.repeat(compose.pattern("[0-9]"), 1, 3, compose.literal(", "))
    assert [accepts(grammar, text) for text in ("", "1", "1, 2, 3", "1, 2, 3, 4", "1, ")] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert accepts(compose.optional(compose.literal("a")), "")


def test_a_rollback_undoes_tokens_across_parts() -> None:
    """The engine rolls back rejected drafts: the masks before and after must be the same."""
    grammar = compose.after_reasoning(object_grammar(), "</think>")
    rng = random.Random(3)
    answer = None
    while answer is None or len(answer) > 300:
        answer = random_answer(grammar, rng)
    tokens = list(answer.encode())
    matcher = matcher_of(grammar)
    for at in range(len(tokens)):
        before = matcher.compute_bitmask()
        ahead = matcher.try_consume_tokens(tokens[at : at + 9])
        assert matcher.rollback(ahead)
        assert matcher.compute_bitmask() == before
        assert matcher.consume_token(tokens[at])
