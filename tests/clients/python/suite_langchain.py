"""langchain-openai: ChatOpenAI over chat completions and over responses."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from shared import QUESTION, SCHEMA, Report, Weather, check_arguments

MESSAGES: list[Any] = [SystemMessage("Be brief."), HumanMessage(QUESTION)]


@tool
def get_weather(city: Literal["Oslo", "Paris"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """Look up the weather of a city."""
    return f"3 degrees {unit} in {city}"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(url: str, model: str, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=100, max_retries=0,  # type: ignore[arg-type]
        use_responses_api=request.param, stream_usage=True,
    )  # fmt: skip


def test_a_chat_and_its_stream(chat: ChatOpenAI) -> None:
    brief = chat.model_copy(update={"max_tokens": 24})
    whole = brief.invoke(MESSAGES)
    assert whole.text
    assert whole.usage_metadata is not None
    parts = list(brief.stream(MESSAGES))
    assert "".join(part.text for part in parts) == whole.text
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert isinstance(total, AIMessageChunk)
    assert total.usage_metadata is not None
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


async def test_asynchronously_and_in_a_batch(chat: ChatOpenAI) -> None:
    brief = chat.model_copy(update={"max_tokens": 8})
    assert [part async for part in brief.astream(MESSAGES)]
    assert len(await brief.abatch([MESSAGES, MESSAGES])) == 2


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_call_and_its_result(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([get_weather], tool_choice=choice)
    message = bound.invoke(MESSAGES)
    assert message.tool_calls
    assert not message.invalid_tool_calls
    for call in message.tool_calls:
        check_arguments(call["args"])
    total: Any = None
    for part in bound.stream(MESSAGES):
        total = part if total is None else total + part
    assert [call["args"] for call in total.tool_calls] == [call["args"] for call in message.tool_calls]
    results = [get_weather.invoke(call) for call in message.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    last = chat.model_copy(update={"max_tokens": 16}).invoke([*MESSAGES, message, *results])
    assert last.text


@pytest.mark.parametrize("strict", [True, None])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any, strict: bool | None) -> None:
    for kind in (Weather, Report):
        found = chat.with_structured_output(kind, method=method, strict=strict).invoke(MESSAGES)
        assert isinstance(found, kind)


def test_structured_output_of_a_plain_schema_and_its_stream(chat: ChatOpenAI) -> None:
    schema = {"title": "weather", "description": "The weather of a city.", **SCHEMA}
    asked = chat.with_structured_output(schema, method="json_schema", strict=True)
    found: Any = asked.invoke(MESSAGES)
    assert found.keys() == {"city", "windy"}
    assert list(asked.stream(MESSAGES))[-1] == found


def test_any_json_object(chat: ChatOpenAI) -> None:
    """What it has in it is the model's, and may be cut by max_tokens."""
    forms: dict[str, Any] = {"type": "json_object"}
    asked = chat.bind(text={"format": forms}) if chat.use_responses_api else chat.bind(response_format=forms)
    assert "".join(part.text for part in asked.stream(MESSAGES)).startswith("{")
