"""openai: chat completions and completions."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import pydantic_function_tool
from shared import FUNCTION, MESSAGES, SCHEMA, TOOLS, GetWeather, Report, Weather, check_arguments

NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def test_a_model_is_listed(client: openai.OpenAI, model: str) -> None:
    assert model in [each.id for each in client.models.list()]
    assert client.models.retrieve(model).id == model


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(client: openai.OpenAI, model: str, stream: bool) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "The sea is", "max_tokens": 8, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    assert text
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_a_chat_and_its_stream(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_many_chats_at_once(async_client: openai.AsyncOpenAI, model: str) -> None:
    import asyncio

    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    answers = await asyncio.gather(*(async_client.chat.completions.create(**asked) for _ in range(4)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call(client: openai.OpenAI, model: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": model, "messages": MESSAGES, "max_tokens": 100, "temperature": 0, "tools": TOOLS,
        "tool_choice": choice, "parallel_tool_calls": False,
    }  # fmt: skip
    choices = client.chat.completions.create(**asked).choices
    assert choices[0].finish_reason in ("stop", "tool_calls")
    calls = choices[0].message.tool_calls
    assert calls
    assert all(call.id and call.type == "function" for call in calls)
    for call in calls:
        assert call.type == "function"
        if call.function.name == "get_weather":
            check_arguments(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}

    found: dict[int, dict[str, str]] = {}
    reasons = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            if part.id is not None:  # with the name, in a call's first chunk alone
                assert part.index not in found
                found[part.index] = {"name": part.function.name or "", "arguments": ""}
            else:
                assert part.function.name is None
            found[part.index]["arguments"] += part.function.arguments or ""
    assert [(each["name"], each["arguments"]) for each in found.values()] == [
        (call.function.name, call.function.arguments) for call in calls if call.type == "function"
    ]
    assert reasons[-1] == choices[0].finish_reason


def test_a_call_and_its_result(client: openai.OpenAI, model: str) -> None:
    first = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=100, temperature=0, tools=TOOLS, tool_choice=NAMED
    )
    message = first.choices[0].message
    assert message.tool_calls
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 3}'} for call in message.tool_calls
    ]
    history: list[Any] = [*MESSAGES, message, *results]
    last = client.chat.completions.create(model=model, messages=history, max_tokens=16, tools=TOOLS, tool_choice="none")
    assert last.choices[0].message.content
    assert not last.choices[0].message.tool_calls


def test_tools_that_the_model_may_leave_alone(client: openai.OpenAI, model: str) -> None:
    choice = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=32, tools=TOOLS).choices[0]
    assert choice.message.content or choice.message.tool_calls


def test_legacy_functions(client: openai.OpenAI, model: str) -> None:
    choice = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=100,
        temperature=0,
        functions=[FUNCTION],  # type: ignore[list-item]
        function_call={"name": "get_weather"},
    ).choices[0]
    assert choice.message.function_call is not None
    check_arguments(choice.message.function_call.arguments)


def test_formats_of_answers(client: openai.OpenAI, model: str) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    choice = client.chat.completions.create(**asked, response_format=schema).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content is not None
    assert json.loads(choice.message.content).keys() == {"city", "windy"}
    chunks = client.chat.completions.create(**asked, response_format=schema, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    free = client.chat.completions.create(
        **asked | {"max_tokens": 200}, response_format={"type": "json_object"}
    ).choices[0]
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content or ""), dict)


@pytest.mark.parametrize("kind", [Weather, Report])
def test_parse(client: openai.OpenAI, model: str, kind: Any) -> None:
    choice = client.chat.completions.parse(
        model=model, messages=MESSAGES, max_tokens=150, temperature=0, response_format=kind
    ).choices[0]
    assert isinstance(choice.message.parsed, kind)


def test_parse_of_tools(client: openai.OpenAI, model: str) -> None:
    message = client.chat.completions.parse(
        model=model, messages=MESSAGES, max_tokens=100, temperature=0, tool_choice="required",
        tools=[pydantic_function_tool(GetWeather)],
    ).choices[0].message  # fmt: skip
    assert message.tool_calls
    assert isinstance(message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_the_stream_helper(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 100, "temperature": 0}
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        kinds = {event.type for event in stream}
        assert {"chunk", "content.delta", "content.done"} <= kinds
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Weather)
    with client.chat.completions.stream(
        **asked, tools=[pydantic_function_tool(GetWeather)], tool_choice="required"
    ) as stream:
        events = list(stream)
        calls = stream.get_final_completion().choices[0].message.tool_calls
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert calls
    assert len(done) == len(calls)
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)


def test_a_cut_answer_says_so(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=model, messages=MESSAGES, max_tokens=4, response_format=Weather)


def test_errors_have_types_and_places(client: openai.OpenAI, model: str) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, response_format=wrong)
    assert caught.value.param is not None
    assert caught.value.param.startswith("response_format.json_schema.schema")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
