"""gpt-oss's format: channels in any cuts, its grammar, and how it is found."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import ModelError
from pilotfish.text.formats.harmony import HARMONY_CALLS, HARMONY_REASONING, MARKERS, HarmonyFormat
from pilotfish.text.formats.registry import detect
from pilotfish.text.grammar import compose
from pilotfish.text.message import AssistantMessage, NamedTool, Tool
from tests.support.grammars import accepts, begins, random_answer
from tests.support.templates import HARMONY
from tests.text.formats.test_formats import SCHEMAS, TOOLS, assert_same_in_all_cuts, schema

FORM = HarmonyFormat(calls=HARMONY_CALLS, reasoning=HARMONY_REASONING, special={})
ANALYSIS = "<|channel|>analysis<|message|>User asks: <b>weather</b>?<|end|><|start|>assistant"
REMARK = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is  7 degrees.\n<|return|>"
ARGUMENTS = '{"city": "Oslo", "days": 3}'
HEADERS = (
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.weather<|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.weather json<|message|>",
    "<|channel|>commentary to=functions.weather<|message|>",
    " to=functions.weather<|channel|>commentary json<|message|>",
    " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
)


def read(text: str, **given: Any) -> AssistantMessage:
    return assert_same_in_all_cuts(FORM, text, random.Random(1), **given)


def test_channels_are_reasoning_remarks_and_content() -> None:
    message = read(ANALYSIS + REMARK + ANALYSIS + FINAL)
    assert message.reasoning == "User asks: <b>weather</b>?\nUser asks: <b>weather</b>?"
    assert message.content == "I look it up.\nIt is  7 degrees.\n"
    assert message.calls == []


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("before", ["", ANALYSIS, ANALYSIS + REMARK])
def test_calls(header: str, before: str) -> None:
    message = read(f"{before}{header}{ARGUMENTS}<|call|>")
    assert [(call.name, call.arguments) for call in message.calls] == [("weather", ARGUMENTS)]
    assert message.content == ("I look it up." if REMARK in before else "")
    two = f"{before}{header}{ARGUMENTS}<|call|><|start|>assistant{header}<|call|>"
    assert [call.arguments for call in read(two).calls] == [ARGUMENTS, "{}"]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("Plain text.", "", "Plain text."),
        ("<|channel|>analysis<|message|>Hm", "Hm", ""),
        ("<|channel|>analysis<|message|>Hm<|end", "Hm<|end", ""),
        ("<|channel|>final<|message|>a<|", "", "a<|"),
        ("<|channel|>fin", "", ""),
        (" to=5 is written", "", " to=5 is written"),
        (" t", "", " t"),
        ("<|channel|>final<|end|>", "", ""),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "a", "b"),
        ("<|channel|>analysis<|message|>a<|end|>Then text", "a", "Then text"),
        ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        ("<|channel|>commentary to=browser.open<|message|>{}<|call|>", "", "{}"),
        ("<|channel|>" + "x" * 600, "", "<|channel|>" + "x" * 600),
    ],
)
def test_what_is_not_quite_harmony(text: str, reasoning: str, content: str) -> None:
    assert read(text) == AssistantMessage(reasoning, content)


def test_without_tools_or_reasoning_all_is_content() -> None:
    text = f"{ANALYSIS}{HEADERS[0]}{ARGUMENTS}<|call|>"
    for form, tools, expected in (
        (FORM, (), ARGUMENTS),
        (HarmonyFormat(reasoning=HARMONY_REASONING, special={}), TOOLS, ARGUMENTS),
        (FORM.plain(), TOOLS, f"User asks: <b>weather</b>?\n{ARGUMENTS}"),
    ):
        parser, message = form.parser(tools), AssistantMessage()
        message.add([*parser.feed(text), *parser.finish()])
        assert (message.content, message.calls) == (expected, [])


def test_an_answer_that_goes_on() -> None:
    for begun, text, expected in (
        (False, f"so<|end|><|start|>assistant{FINAL}", AssistantMessage("so", "It is  7 degrees.\n")),
        (True, " to=7 degrees<|return|>", AssistantMessage("", " to=7 degrees")),
    ):
        parser, message = FORM.parser(TOOLS, in_reasoning=not begun, begun=begun), AssistantMessage()
        message.add([*parser.feed(text), *parser.finish()])
        assert message == expected


@given(
    st.lists(
        st.sampled_from([*MARKERS, *HEADERS, "analysis", "final", "commentary", " to=", "é😀", "\n", "a", "<|", "{}"])
    ),
    st.booleans(),
    st.randoms(),
)
def test_any_text_in_any_cuts(parts: list[str], in_reasoning: bool, rng: random.Random) -> None:
    assert_same_in_all_cuts(FORM, "".join(parts), rng, in_reasoning)


@pytest.mark.parametrize("choice", ["required", NamedTool("weather"), "auto"])
def test_what_the_grammar_allows_is_read(choice: Any) -> None:
    rng = random.Random(2)
    grammar = FORM.grammar(TOOLS, choice, schema=schema)
    assert grammar is not None
    texts = [text for text in (random_answer(grammar, rng, 600) for _ in range(20)) if text is not None]
    assert texts
    for text in texts:
        message = assert_same_in_all_cuts(FORM, text, rng)
        for call in message.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        assert len(message.calls) == 1 or (choice == "auto" and not message.calls)


def test_the_grammar_of_calls() -> None:
    for choice in ("required", "auto", NamedTool("weather")):
        grammar = FORM.grammar(TOOLS, choice, schema=schema)
        assert grammar is not None
        for header in HEADERS:
            assert accepts(grammar, ANALYSIS + REMARK + header + ARGUMENTS)
            assert not begins(grammar, ANALYSIS + header + '{"town"')
            assert not begins(grammar, header.replace("weather", "other"))
        assert begins(grammar, FINAL) == (choice == "auto")
        opened = FORM.grammar(TOOLS, choice, schema=schema, in_reasoning=True)
        assert opened is not None
        assert accepts(opened, f"so<|end|><|start|>assistant{HEADERS[0]}{ARGUMENTS}")
        assert not begins(opened, f"<|end|><|start|>assistant{HEADERS[0]}x")
    assert FORM.grammar(TOOLS, "none", schema=schema) is None


def test_the_grammar_of_a_form() -> None:
    answer = compose.json_value({"type": "integer"})
    for tools in ((), TOOLS):
        grammar = FORM.grammar(tools, "auto", schema=schema, answer=answer)
        assert grammar is not None
        for kind in ("", " <|constrain|>json"):
            assert accepts(grammar, f"{ANALYSIS}<|channel|>final{kind}<|message|>17")
        assert not begins(grammar, "<|channel|>final<|message|>a")
        assert begins(grammar, HEADERS[0]) == bool(tools)
    assert FORM.grammar((), "auto", schema=schema, answer=answer, begun=True) == answer


def test_reasoning_is_where_the_parser_says() -> None:
    text = ANALYSIS + REMARK + ANALYSIS + FINAL
    parser = FORM.parser(TOOLS)
    thinking = [parser.thinking for char in text if parser.feed(char) is not None]
    assert [text[begin:end] for begin, end in parser.thoughts] == ["User asks: <b>weather</b>?"] * 2
    assert thinking.index(False) == text.index("It is  7") - 1


class _Tokenizer:
    special_ids = frozenset(range(len(MARKERS)))
    chat_template = HARMONY

    def token(self, id_: int) -> str:
        return MARKERS[id_]


def test_detection() -> None:
    tokenizer: Any = _Tokenizer()
    form = detect(tokenizer)
    assert isinstance(form, HarmonyFormat)
    assert form.shown == tokenizer.special_ids
    assert form.effort("minimal") == "low"
    assert detect(tokenizer, "none").calls is None
    assert detect(tokenizer, None, "none").reasoning is None
    assert not isinstance(detect(tokenizer, "hermes"), HarmonyFormat)
    assert isinstance(detect(tokenizer, "openai", "openai_gptoss"), HarmonyFormat)
    with pytest.raises(ModelError, match="do not go together"):
        detect(tokenizer, "harmony", "think")


def test_calls_of_the_history_are_written_as_they_are_read() -> None:
    message = read(ANALYSIS + FORM.written_calls([("now", {"a": "é"})]))
    assert [(call.name, call.arguments) for call in message.calls] == [("now", '{"a": "é"}')]
    assert isinstance(FORM.instructions([Tool(name="now")]), str)


def test_deltas_come_as_the_text_does() -> None:
    parser = FORM.parser(TOOLS)
    pieces = ("<|channel|>commentary to=", "functions.now json", "<|message|>", '{"ci', 'ty": 1}', "<|call|>")
    assert [len(parser.feed(each)) for each in pieces] == [0, 0, 1, 1, 1, 0]
