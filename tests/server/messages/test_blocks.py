"""Content blocks of answers: as the events of a stream, and added up."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pilotfish.server.messages.blocks import INVALID, BlockEvent, BlockEvents, content_of
from pilotfish.text.message import CallArguments, CallBegin, ContentText, Part, ReasoningText

ANTHROPICS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
DELTAS = {
    "text": {"text_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
}


def summed(events: list[BlockEvent]) -> list[dict[str, Any]]:
    """The blocks that events add up to, by Anthropic's documentation. Their types and order are checked."""
    blocks: list[dict[str, Any]] = []
    open_: int | None = None
    last = ""
    for event in json.loads(msgspec.json.encode(events)):
        assert ANTHROPICS.validate_python(event).type == event["type"]
        if event["type"] == "content_block_start":
            assert (open_, event["index"]) == (None, len(blocks))
            open_, last = event["index"], ""
            blocks.append(event["content_block"] | {"json": ""})
            continue
        assert event["index"] == open_
        if event["type"] == "content_block_stop":
            assert (blocks[-1]["type"] == "thinking") == (last == "signature_delta")
            open_ = None
            continue
        block, delta = blocks[-1], event["delta"]
        last = delta["type"]
        assert delta["type"] in DELTAS[block["type"]]
        match delta["type"]:
            case "text_delta":
                block["text"] += delta["text"]
            case "thinking_delta":
                block["thinking"] += delta["thinking"]
            case "input_json_delta":
                block["json"] += delta["partial_json"]
    assert open_ is None
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text) if text else {}
    return blocks


def whole(parts: list[Part], show_thinking: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(msgspec.json.encode(content_of(parts, show_thinking)))
    return found


def streamed(parts: list[Part], cuts: list[int], show_thinking: bool = True) -> list[dict[str, Any]]:
    blocks = BlockEvents(show_thinking)
    events: list[BlockEvent] = []
    at = [0, *sorted(cut % (len(parts) + 1) for cut in cuts), len(parts)]
    for begin, end in pairwise(at):
        events += blocks.add(parts[begin:end])
    return summed(events + blocks.end())


TEXTS = st.lists(st.text(alphabet="ab \n", max_size=3), max_size=4)
ARGUMENTS = st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def answers(draw: st.DrawFn) -> list[Part]:
    parts: list[Part] = []
    for kind in draw(st.lists(st.sampled_from(["reasoning", "content", "call"]), max_size=6)):
        if kind == "call":
            index = sum(isinstance(part, CallBegin) for part in parts)
            parts.append(CallBegin(index, f"toolu_{index}", "f"))
            text = json.dumps(draw(ARGUMENTS))
            cut = draw(st.integers(0, len(text)))
            parts += [CallArguments(index, text[:cut]), CallArguments(index, text[cut:])]
        else:
            make = ReasoningText if kind == "reasoning" else ContentText
            parts += [make(text) for text in draw(TEXTS)]
    return parts


@given(answers(), st.lists(st.integers(0, 99), max_size=5), st.booleans())
def test_a_stream_adds_up_to_the_whole_answer(parts: list[Part], cuts: list[int], show_thinking: bool) -> None:
    assert streamed(parts, cuts, show_thinking) == whole(parts, show_thinking)


@given(answers())
def test_blocks_have_what_the_parts_have(parts: list[Part]) -> None:
    blocks = whole(parts)
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningText))
    content = "".join(part.text for part in parts if isinstance(part, ContentText))
    assert blocks
    assert "".join(block["thinking"] for block in blocks if block["type"] == "thinking") == reasoning
    shown = "".join(block["text"] for block in blocks if block["type"] == "text")
    assert "".join(shown.split()) == "".join(content.split())
    calls = [part for part in parts if isinstance(part, CallBegin)]
    assert [block["id"] for block in blocks if block["type"] == "tool_use"] == [call.id for call in calls]


def test_white_space_between_other_blocks_is_no_block() -> None:
    parts: list[Part] = [
        ContentText("\n"), ReasoningText("hm"), ContentText("\n\n"), ContentText(" so"), ContentText(" it is\n"),
        CallBegin(0, "a", "f"), CallArguments(0, "{}"), ContentText("\n"), CallBegin(1, "b", "f"), ContentText(" \n"),
    ]  # fmt: skip
    assert [(block["type"], block.get("text")) for block in whole(parts)] == [
        ("thinking", None), ("text", "\n\n so it is\n"), ("tool_use", None), ("tool_use", None),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [[], [ContentText("")], [ContentText(" "), ContentText("\n")]])
def test_an_answer_of_nothing_has_a_block_of_text(parts: list[Part]) -> None:
    text = "".join(part.text for part in parts if isinstance(part, ContentText))
    assert whole(parts) == [{"type": "text", "text": text, "citations": None}]


def test_thinking_may_be_left_out() -> None:
    parts: list[Part] = [ReasoningText("secret"), ContentText("4")]
    assert whole(parts, show_thinking=False)[0] == {"type": "thinking", "thinking": "", "signature": ""}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("", {}),
        ('{"n": 12345678901234567890.10}', {"n": 12345678901234567890.10}),
        ('{"city": "Par', {}),
        ('{"city": "Paris", "days": [1, 2', {"city": "Paris", "days": [1, 2]}),
        ('{"a": 1}}', {"a": 1}),
        ("[1]", {INVALID: "[1]"}),
        ("city=Paris", {INVALID: "city=Paris"}),
        ('{"a": NaN}', {INVALID: '{"a": NaN}'}),
        ('{"a": "\\ud800"}', {INVALID: '{"a": "\\ud800"}'}),
        ('{"a": 1' + "0" * 5000 + "}", {INVALID: '{"a": 1' + "0" * 5000 + "}"}),
        ("[" * 5000, {INVALID: "[" * 5000}),
    ],
    ids=lambda value: str(value)[:24],
)
def test_input_is_an_object_whatever_the_model_writes(arguments: str, found: dict[str, Any]) -> None:
    (block,) = whole([CallBegin(0, "a", "f"), CallArguments(0, arguments)])
    assert block["input"] == found


def test_input_keeps_the_digits_of_numbers() -> None:
    arguments = '{"n": 1.10, "big": 123456789012345678901234567890}'
    (block,) = content_of([CallBegin(0, "a", "f"), CallArguments(0, arguments)])
    assert arguments.encode() in msgspec.json.encode(block)
