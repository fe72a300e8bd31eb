"""openai: responses."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from shared import PARAMETERS, QUESTION, SCHEMA, GetWeather, Weather, check_arguments

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Look up the weather.",
    "parameters": PARAMETERS,
    "strict": True,
}


def test_a_response_and_its_stream(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**asked, instructions="Be brief.")
    assert whole.status in ("completed", "incomplete")
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**asked, instructions="Be brief.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_items_as_input(client: openai.OpenAI, model: str) -> None:
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"role": "assistant", "content": "It is cold."},
        {"role": "user", "content": "How cold?"},
    ]
    assert client.responses.create(model=model, input=items, max_output_tokens=16).output_text


def test_what_is_stored(client: openai.OpenAI, model: str) -> None:
    first = client.responses.create(model=model, input="My name is Ada.", max_output_tokens=16)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(
        model=model, input="What is my name?", max_output_tokens=16, previous_response_id=first.id
    )
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    unstored = client.responses.create(model=model, input="Hello", max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_and_its_result(client: openai.OpenAI, model: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": model, "input": QUESTION, "max_output_tokens": 100, "temperature": 0, "tools": [TOOL],
        "tool_choice": choice,
    }  # fmt: skip
    whole = client.responses.create(**asked)
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls
    assert all(call.name == "get_weather" and call.call_id for call in calls)
    for call in calls:
        check_arguments(call.arguments)
    events = list(client.responses.create(**asked, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == "".join(call.arguments for call in calls)
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments for call in calls]

    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"} for call in calls]
    more: Any = {"model": model, "max_output_tokens": 16, "tools": [TOOL], "tool_choice": "none"}
    assert client.responses.create(**more, input=results, previous_response_id=whole.id).output_text
    history: Any = [{"role": "user", "content": QUESTION}, *whole.output, *results]
    assert client.responses.create(**more, input=history).output_text


def test_formats_of_answers(client: openai.OpenAI, model: str) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(model=model, input=QUESTION, max_output_tokens=60, temperature=0, text=text)
    assert answer.status == "completed"
    assert json.loads(answer.output_text).keys() == {"city", "windy"}


def test_parse(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "input": QUESTION, "max_output_tokens": 100, "temperature": 0}
    assert isinstance(client.responses.parse(**asked, text_format=Weather).output_parsed, Weather)
    tools: Any = [openai.pydantic_function_tool(GetWeather)["function"] | {"type": "function"}]
    answer = client.responses.parse(**asked, tools=tools, tool_choice="required")
    assert any(item.type == "function_call" for item in answer.output)


def test_the_stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(
        model=model, input=QUESTION, max_output_tokens=100, temperature=0, text_format=Weather
    ) as stream:
        kinds = [event.type for event in stream]
        parsed = stream.get_final_response().output_parsed
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] == "response.completed"
    assert isinstance(parsed, Weather)


def test_background_is_refused(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.create(model=model, input="Hello", background=True)


async def test_an_asynchronous_stream(async_client: openai.AsyncOpenAI, model: str) -> None:
    stream = await async_client.responses.create(model=model, input=QUESTION, max_output_tokens=8, stream=True)
    assert [event.type async for event in stream][-1] in ("response.completed", "response.incomplete")
