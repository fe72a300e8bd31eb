"""Messages requests as conversations, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from pilotfish.server.errors import ApiError, as_api_error
from pilotfish.server.messages.conversation import conversation_of
from pilotfish.server.prompting.conversation import Conversation, Turn
from pilotfish.server.protocol.messages import CountTokensRequest
from pilotfish.text.message import NamedTool, Tool, ToolCall

HELLO = {"role": "user", "content": "Hello"}
WEATHER = {"name": "weather", "description": "Look it up.", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    body = {"model": "m", "messages": list(messages) or [HELLO], **fields}
    return conversation_of(CountTokensRequest.model_validate(body))


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}, "citations": None} for text in texts]


def test_a_string_is_a_block_of_text() -> None:
    assert conversation(HELLO, system="Be brief.") == conversation(
        {"role": "user", "content": text("Hello"), "id": 3}, system=text("Be brief.")
    )
    assert conversation(HELLO, system="Be brief.").turns == [
        Turn(role="system", content="Be brief."), Turn(role="user", content="Hello"),
    ]  # fmt: skip


@pytest.mark.parametrize("system", [None, "", [], text("")])
def test_no_system_prompt_is_no_turn(system: Any) -> None:
    assert conversation(system=system).turns == [Turn(role="user", content="Hello")]


def test_messages_of_one_role_are_one_turn() -> None:
    made = conversation(
        {"role": "system", "content": "also"}, HELLO, {"role": "user", "content": text("a", "b")},
        {"role": "assistant", "content": text("c", "d")}, {"role": "assistant", "content": "e"}, HELLO, system="first",
    )  # fmt: skip
    assert [(turn.role, turn.content) for turn in made.turns] == [
        ("system", "first\nalso"), ("user", "Hello\na\nb"), ("assistant", "cd\ne"), ("user", "Hello"),
    ]  # fmt: skip


def test_calls_and_their_results() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "x"}
    answer = {
        "role": "assistant",
        "content": [
            {"type": "redacted_thinking", "data": "?"},
            thinking,
            *text("Let me see."),
            CALL,
            CALL | {"id": "b"},
        ],
    }
    results = {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "b", "content": text("rain", "wind")},
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no such city", "is_error": True},
            {"type": "tool_result", "tool_use_id": "b"},
            *text("Well?"),
        ],
    }
    arguments = '{"city": "Köln"}'
    assert conversation(HELLO, answer, results).turns[1:] == [
        Turn(
            role="assistant",
            content="Let me see.",
            reasoning="hm",
            calls=(ToolCall("toolu_1", "weather", arguments), ToolCall("b", "weather", arguments)),
        ),
        Turn(role="tool", content="rain\nwind", name="weather", call_id="b"),
        Turn(role="tool", content="Error: no such city", name="weather", call_id="toolu_1"),
        Turn(role="tool", content="", name="weather", call_id="b"),
        Turn(role="user", content="Well?"),
    ]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    made = conversation(HELLO, {"role": "assistant", "content": "The answer is ("})
    assert (made.continue_final_message, made.add_generation_prompt) == (True, False)
    assert made.turns[-1] == Turn(role="assistant", content="The answer is (")
    for empty in ("", [], text("")):
        made = conversation(HELLO, {"role": "assistant", "content": empty})
        assert (made.continue_final_message, made.add_generation_prompt) == (False, True)
        assert made.turns == [Turn(role="user", content="Hello")]


def test_tools() -> None:
    tools = [WEATHER, {"name": "now", "input_schema": {}, "strict": True, "type": "custom", "defer_loading": False}]
    assert conversation(tools=tools).tools == [
        Tool(
            name="weather",
            description="Look it up.",
            parameters={"type": "object"},
            place="tools[0].input_schema",
        ),
        Tool(name="now", parameters={}, strict=True, place="tools[1].input_schema"),
    ]


@pytest.mark.parametrize(
    ("choice", "found", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "weather"}, NamedTool("weather"), True),
        ({"type": "none"}, "none", True),
    ],
)
def test_tool_choice(choice: Any, found: Any, parallel: bool) -> None:
    made = conversation(tools=[WEATHER], tool_choice=choice)
    assert (made.tool_choice, made.parallel_tool_calls) == (found, parallel)


@pytest.mark.parametrize(
    ("thinking", "enabled", "budget"),
    [
        (None, False, None),
        ({"type": "disabled"}, False, None),
        ({"type": "adaptive", "display": "omitted"}, True, None),
        ({"type": "enabled", "budget_tokens": 2000}, True, 2000),
        ({"type": "enabled", "budget_tokens": 10**30}, True, 2**31 - 1),
    ],
)
def test_thinking_is_off_unless_asked_for(thinking: Any, enabled: bool, budget: int | None) -> None:
    made = conversation(thinking=thinking)
    assert (made.enable_reasoning, made.thinking_budget) == (enabled, budget)


def test_effort() -> None:
    assert [
        conversation(output_config={"effort": effort}).reasoning_effort
        for effort in ("low", "medium", "high", "xhigh", "max", None)
    ] == ["low", "medium", "high", "high", "high", None]


def block(block: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [*text("a"), block]}, HELLO]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com"}}
LATE = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]}
DEEP: dict[str, Any] = {}
for _ in range(20_000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        (block(IMAGE), "messages[0].content[1]"),
        (block({"type": "document"}), "messages[0].content[1]"),
        (block({"type": "server_tool_use"}, "assistant"), "messages[0].content[1]"),
        (block(LATE), "messages[0].content[1].content[0]"),
        (block({"type": "text"}), "messages[0].content[1].text"),
        (block({"type": "text", "text": 3}), "messages[0].content[1].text"),
        (block({"text": "a"}), "messages[0].content[1]"),
        (block("a"), "messages[0].content[1]"),
        (block({"type": []}), "messages[0].content[1]"),
        (block(CALL | {"input": "{}"}, "assistant"), "messages[0].content[1].input"),
        (block(CALL | {"input": {"a": float("nan")}}, "assistant"), "messages[0].content[1].input"),
        (block(CALL | {"input": DEEP}, "assistant"), "messages[0].content[1].input"),
        (block(CALL), "messages[0].content[1]"),
        (block({"type": "tool_result", "tool_use_id": "x"}), "messages[0].content[1].tool_use_id"),
        (block({"type": "tool_result", "tool_use_id": "x"}, "assistant"), "messages[0].content[1]"),
        (block(CALL, "system"), "messages[0].content[1]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"messages": [HELLO, {"role": "assistant", "content": [CALL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"system": 3}, "system"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema", "schema": 1}}, "output_format.schema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_refused_by_its_place(fields: dict[str, Any], place: str) -> None:
    try:
        conversation_of(CountTokensRequest.model_validate({"model": "m", "messages": [HELLO]} | fields))
    except ValidationError as invalid:
        error = as_api_error(RequestValidationError(invalid.errors()), "")
    except ApiError as refused:
        error = refused
    else:
        pytest.fail("it was not refused")
    assert (error.status, error.param) == (400, place)
    assert error.message.startswith((place, "Missing required parameter"))
