"""The Messages API on a real server with a real engine, through Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.support.running_server import MODEL, RunningServer

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("http")]

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["happy", "sad"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"name": "describe", "description": "Describe a person.", "input_schema": PERSON}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def anthropics(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_the_text_is_that_of_chat(anthropics: anthropic.Anthropic, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"seed": 7, "temperature": 0.8}
    message = anthropics.messages.create(model=MODEL, max_tokens=24, messages=MESSAGES, extra_body=body)
    chat = client.chat.completions.create(model=MODEL, max_tokens=24, messages=MESSAGES, **body)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content
    assert chat.usage is not None
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    counted = anthropics.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_a_demanded_call_and_its_result(anthropics: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": TOOLS, "extra_body": GREEDY}
    choice: Any = {"type": "tool", "name": "describe"}
    message = anthropics.messages.create(**asked, messages=MESSAGES, tool_choice=choice)
    (call,) = message.content
    assert call.type == "tool_use"
    assert (call.name, message.stop_reason) == ("describe", "tool_use")
    jsonschema.validate(call.input, PERSON)
    with anthropics.messages.stream(**asked, messages=MESSAGES, tool_choice=choice) as stream:
        inputs = [event.snapshot for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert len(inputs) > 1
    (again,) = streamed.content
    assert again.type == "tool_use"
    assert again.input == call.input == inputs[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "fine"}
    history = [*MESSAGES, message.to_param(), {"role": "user", "content": [result]}]
    assert anthropics.messages.create(**asked | {"max_tokens": 4}, messages=history).usage.output_tokens == 4


def test_text_in_a_demanded_form(anthropics: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": PERSON}}
    message = anthropics.messages.create(
        model=MODEL, max_tokens=200, messages=MESSAGES, output_config=form, extra_body=GREEDY
    )
    (block,) = message.content
    assert block.type == "text"
    assert message.stop_reason == "end_turn"
    jsonschema.validate(json.loads(block.text), PERSON)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        (
            {
                "tools": [TOOLS[0] | {"strict": True, "input_schema": {"type": "nothing"}}],
                "tool_choice": {"type": "any"},
            },
            "tools[0].input_schema",
        ),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json_schema", "schema": {"type": 3}}}, "output_format.schema"),
        (
            {
                "output_format": {"type": "json_schema", "schema": PERSON},
                "messages": [*MESSAGES, {"role": "assistant", "content": "{"}],
            },
            "output_format.schema",
        ),
        ({"system": "long " * 4000}, "prompt is too long"),
    ],
    ids=["tool", "format", "older", "prefill", "long"],
)
def test_what_cannot_be_answered_is_refused(
    anthropics: anthropic.Anthropic, fields: dict[str, Any], place: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        anthropics.messages.create(model=MODEL, max_tokens=4, messages=MESSAGES, extra_body=fields)
    assert place in str(caught.value)


def test_a_stream_that_is_left_ends_the_request(anthropics: anthropic.Anthropic, server: RunningServer) -> None:
    def aborted() -> float:
        name = 'pilotfish_requests_total{outcome="abort"}'
        return server.metric(name) if name in server.http.get("/metrics").text else 0.0

    before = aborted()
    with anthropics.messages.create(model=MODEL, max_tokens=1500, messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    server.wait_until(lambda: aborted() > before, 20)
