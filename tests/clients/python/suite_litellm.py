"""litellm: its providers for servers like this one."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from shared import MESSAGES, QUESTION, SCHEMA, TOOLS, Weather, check_arguments

litellm.suppress_debug_info = True
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(url: str, model: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "model": f"{request.param}/{model}", "api_base": f"{url}/v1", "api_key": "none", "messages": MESSAGES,
        "max_tokens": 100, "temperature": 0, "num_retries": 0,
    }  # fmt: skip


def test_a_chat_and_its_stream(asked: dict[str, Any]) -> None:
    whole: Any = litellm.completion(**asked | {"max_tokens": 24})
    chunks: Any = list(litellm.completion(**asked | {"max_tokens": 24}, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens


async def test_asynchronously(asked: dict[str, Any]) -> None:
    stream: Any = await litellm.acompletion(**asked | {"max_tokens": 8}, stream=True)
    assert [chunk async for chunk in stream]


def test_text_completion(url: str, model: str) -> None:
    answer: Any = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="none", prompt="The sea is", max_tokens=8
    )
    assert answer.choices[0].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call(asked: dict[str, Any], choice: Any) -> None:
    more = {"tools": TOOLS[:1], "tool_choice": choice}
    whole: Any = litellm.completion(**asked, **more)
    calls = whole.choices[0].message.tool_calls
    assert calls
    for call in calls:
        check_arguments(call.function.arguments)
    rebuilt: Any = litellm.stream_chunk_builder(list(litellm.completion(**asked, **more, stream=True)))
    assert [call.function.arguments for call in rebuilt.choices[0].message.tool_calls] == [
        call.function.arguments for call in calls
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3 degrees"} for call in calls]
    history = [*MESSAGES, whole.choices[0].message, *results]
    last: Any = litellm.completion(**asked | {"messages": history, "max_tokens": 8})
    assert last.choices[0].message.content is not None


@pytest.mark.parametrize("form", [Weather, FORMAT])
def test_formats_of_answers(asked: dict[str, Any], form: Any) -> None:
    whole: Any = litellm.completion(**asked, response_format=form)
    content = whole.choices[0].message.content
    assert {"city", "windy"} <= json.loads(content).keys()
    chunks: Any = litellm.completion(**asked, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content


def test_responses(url: str, model: str) -> None:
    asked: Any = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "input": QUESTION}
    whole: Any = litellm.responses(**asked, max_output_tokens=16)
    assert whole.output
    events: Any = list(litellm.responses(**asked, max_output_tokens=16, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_anthropics_messages(url: str, model: str) -> None:
    answer: Any = litellm.completion(
        model=f"anthropic/{model}", api_base=url, api_key="none", messages=MESSAGES, max_tokens=16
    )
    assert answer.choices[0].message.content
