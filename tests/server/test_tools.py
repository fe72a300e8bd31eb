"""Tools, structured output and prefill on a real server with the real SmolLM2, whose template knows no tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from pilotfish.checkpoints.catalog import ModelFiles
from tests.support.running_server import RunningServer

pytestmark = [pytest.mark.process, pytest.mark.real_model, pytest.mark.xdist_group("tools")]  # one server

MODEL = "smollm2-135m"
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather like in Oslo?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ONE: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "sampled": {"temperature": 1.2, "seed": 3}}


class GetWeather(BaseModel):
    city: Literal["Oslo", "Paris"]
    unit: Literal["celsius", "fahrenheit"]


@pytest.fixture(scope="module")
def real(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("tools") / "log"
    running = RunningServer(log, "--model", MODEL, "--kv-cache-memory", "256MiB", "--suffix-memory", "0")
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def asked(real: RunningServer) -> Iterator[openai.OpenAI]:
    with real.client() as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 120, "temperature": 0, **fields}
    return client.chat.completions.create(**given).choices[0]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_demanded_comes_and_fits(asked: openai.OpenAI, choice: Any, sampling: str) -> None:
    answer = ask(asked, **ONE, tool_choice=choice, **SAMPLING[sampling])
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name in ("get_weather", "now")
    if choice == NAMED or call.function.name == "get_weather":
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_same_calls_with_and_without_speculation(asked: openai.OpenAI, sampling: str) -> None:
    def calls(speculation: str) -> list[tuple[str, str]]:
        body = {"speculation": speculation}
        # Several calls, and a cut: what comes is compared, however it ends.
        answer = ask(asked, tools=TOOLS, tool_choice="required", extra_body=body, **SAMPLING[sampling])
        return [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]

    texts = {speculation: calls(speculation) for speculation in ("off", "auto", "ngram", "grammar")}
    assert texts["off"]
    assert all(text == texts["off"] for text in texts.values())


def test_a_stream_adds_up_to_the_whole(asked: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**ONE, "tool_choice": NAMED}
    whole = ask(asked, **fields)
    stream = asked.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=120, temperature=0, stream=True, **fields
    )
    deltas = [chunk.choices[0] for chunk in stream]
    parts = [part for each in deltas for part in each.delta.tool_calls or ()]
    assert (parts[0].index, parts[0].type, parts[0].function.name) == (0, "function", "get_weather")
    assert parts[0].id
    assert len(parts) > 3, "the arguments do not come as they grow"
    assert all(part.id is None and part.function.name is None and part.index == 0 for part in parts[1:])
    arguments = "".join(part.function.arguments or "" for part in parts)
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert "".join(each.delta.content or "" for each in deltas) == ""
    assert deltas[-1].finish_reason == "tool_calls"


def test_no_tools_are_shown_and_enforced_with_none(asked: openai.OpenAI) -> None:
    plain = ask(asked, max_tokens=16)
    assert ask(asked, max_tokens=16, tools=TOOLS, tool_choice="none").message == plain.message
    assert ask(asked, max_tokens=16, tools=[]).message == plain.message


def test_a_call_and_its_result_go_back(asked: openai.OpenAI) -> None:
    message = ask(asked, **ONE, tool_choice=NAMED).message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"degrees": 17}'}
    answer = ask(asked, messages=[*QUESTION, message, result], tools=TOOLS, max_tokens=40)
    assert answer.message.content


def test_legacy_functions(asked: openai.OpenAI) -> None:
    functions = [tool["function"] for tool in TOOLS]
    answer = ask(asked, functions=functions, function_call={"name": "get_weather"})
    assert answer.finish_reason == "function_call"
    jsonschema.validate(json.loads(answer.message.function_call.arguments), PARAMETERS)
    messages = [*QUESTION, answer.message, {"role": "function", "name": "get_weather", "content": "17 degrees"}]
    assert ask(asked, messages=messages, functions=functions, function_call="none", max_tokens=8).message.content


@pytest.mark.parametrize("speculation", ["auto", "off"])
def test_a_schema_is_kept(asked: openai.OpenAI, speculation: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "forecast", "strict": True, "schema": PARAMETERS}}
    answer = ask(asked, response_format=form, extra_body={"speculation": speculation})
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content), PARAMETERS)
    cut = ask(asked, response_format=form, max_tokens=6)
    assert cut.finish_reason == "length"
    assert answer.message.content.startswith(cut.message.content)


def test_other_names_of_forms_and_completions(asked: openai.OpenAI) -> None:
    assert ask(asked, extra_body={"guided_choice": ["yes", "no"]}).message.content in ("yes", "no")
    digits = {"structured_outputs": {"regex": "[0-9]{3}"}}
    assert ask(asked, extra_body=digits).message.content.isdecimal()
    done = asked.completions.create(model=MODEL, prompt="The answer is ", extra_body=digits).choices[0]
    assert done.text.isdecimal()
    assert len(done.text) == 3
    text = ask(asked, extra_body={"grammar": 'root ::= "a" "b"+ "c"'}, max_tokens=10).message.content
    assert text.startswith("ab")


def test_openais_helpers(asked: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 120, "temperature": 0}
    parsed = asked.chat.completions.parse(**given, response_format=GetWeather)
    assert isinstance(parsed.choices[0].message.parsed, GetWeather)
    sent_back = parsed.choices[0].message.model_dump(mode="json", warnings=False)
    assert sent_back["parsed"]
    again = ask(asked, messages=[*QUESTION, sent_back, *QUESTION], max_tokens=4)
    assert again.message.content
    demanded: dict[str, Any] = {
        "tools": [pydantic_function_tool(GetWeather)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    with asked.chat.completions.stream(**given, **demanded) as stream:
        kinds = {event.type for event in stream}
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert calls is not None
    (call,) = calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_an_answer_that_goes_on_is_the_whole_one(asked: openai.OpenAI) -> None:
    """Greedy, what follows a begun answer is what followed it in the whole answer."""
    whole = ask(asked, max_tokens=24).message.content
    begun = whole[: whole.index(" ", len(whole) // 2)]  # words begin with their space: tokens are whole
    history = [*QUESTION, {"role": "assistant", "content": begun}]
    on = ask(asked, messages=history, max_tokens=8, extra_body={"continue_final_message": True}).message.content
    assert (begun + on).startswith(whole) or whole.startswith(begun + on)
    prefix = [*QUESTION, {"role": "assistant", "content": begun, "prefix": True}]
    assert ask(asked, messages=prefix, max_tokens=8).message.content == on
    answered = ask(asked, messages=history, max_tokens=8).message.content
    assert answered != on
