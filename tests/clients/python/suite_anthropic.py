"""anthropic: messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from shared import PARAMETERS, QUESTION, Weather, check_arguments

TOOL: Any = {"name": "get_weather", "description": "Look up the weather.", "input_schema": PARAMETERS}
GREEDY: Any = {"extra_body": {"temperature": 0}}  # the SDK itself has no such parameter
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_message_and_its_stream(claude: anthropic.Anthropic, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 24, "system": "Be brief.", **GREEDY}
    whole = claude.messages.create(**asked)
    assert whole.role == "assistant"
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.content[0].type == "text"
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in claude.messages.create(**asked, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_tokens_are_counted(claude: anthropic.Anthropic, model: str) -> None:
    counted = claude.messages.count_tokens(model=model, messages=MESSAGES, system="Be brief.")
    answer = claude.messages.create(model=model, messages=MESSAGES, system="Be brief.", max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > 0


def test_stop_sequences(claude: anthropic.Anthropic, model: str) -> None:
    free = claude.messages.create(model=model, messages=MESSAGES, max_tokens=24, **GREEDY)
    assert free.content[0].type == "text"
    word = free.content[0].text.split()[2]
    answer = claude.messages.create(model=model, messages=MESSAGES, max_tokens=24, stop_sequences=[word], **GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", word)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_and_its_result(claude: anthropic.Anthropic, model: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": model, "messages": MESSAGES, "max_tokens": 100, "tools": [TOOL],
        "tool_choice": choice, **GREEDY,
    }  # fmt: skip
    whole = claude.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert calls
    for call in calls:
        check_arguments(call.input)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [call.input for call in calls]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "3 degrees"} for call in calls]
    history: Any = [*MESSAGES, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    last = claude.messages.create(
        model=model, messages=history, max_tokens=16, tools=[TOOL], tool_choice={"type": "none"}
    )
    assert last.content[0].type == "text"


def test_tools_that_the_model_may_leave_alone(claude: anthropic.Anthropic, model: str) -> None:
    answer = claude.messages.create(model=model, messages=MESSAGES, max_tokens=32, tools=[TOOL])
    assert answer.content


def test_parse(claude: anthropic.Anthropic, model: str) -> None:
    answer = claude.messages.parse(model=model, messages=MESSAGES, max_tokens=100, output_format=Weather, **GREEDY)
    assert isinstance(answer.parsed_output, Weather)


def test_errors_have_anthropics_form(claude: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=model, messages=[], max_tokens=8)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", messages=MESSAGES, max_tokens=8)


async def test_an_asynchronous_stream(url: str, model: str) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as claude,
        claude.messages.stream(model=model, messages=MESSAGES, max_tokens=8) as stream,
    ):
        assert [text async for text in stream.text_stream]
