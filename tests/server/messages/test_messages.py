"""POST /v1/messages over a scripted engine, through Anthropic's client, and event by event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.request import Delta, Request
from pilotfish.server.config import ServerConfig
from pilotfish.server.generation import events
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "messages": [{"role": "user", "content": "a"}]}
TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Any) -> Tokenizer:
    return load_tokenizer(ModelFiles("tiny", "huggingface", tiny_llama))


Serving = Callable[..., ScriptedApp]


@pytest.fixture
def serving(tokenizer: Tokenizer) -> Serving:
    """`serving(text, group=1, reason="stop")`: an application whose model says a text, `group` tokens at a time."""

    def made(text: str, *, group: int = 1, reason: str = "stop", cached: int = 0) -> ScriptedApp:
        ids = tokenizer.encode(text, add_special_tokens=False)

        def script(request: Request) -> Sequence[Delta]:
            groups = [ids[i : i + group] for i in range(0, len(ids), group)]
            first, *rest = say(request, *groups)
            deltas = [msgspec.structs.replace(first, cached_prompt_tokens=cached), *rest]
            return [*deltas[:-1], msgspec.structs.replace(deltas[-1], finish_reason=reason)]

        app = ScriptedApp(script, ServerConfig(reasoning_parser="think"), tokenizer)
        app.engine.info = msgspec.structs.replace(INFO, max_model_len=1024)
        return app

    return made


def client_of(app: ScriptedApp) -> anthropic.AsyncAnthropic:
    transport: Any = httpx2.ASGITransport(app.app)
    http = httpx2.AsyncClient(transport=transport)
    return anthropic.AsyncAnthropic(base_url="http://test", api_key="none", max_retries=0, http_client=http)


async def whole(app: ScriptedApp, **fields: Any) -> dict[str, Any]:
    response = await app.http.post("/v1/messages", json=ASKED | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    Message.model_validate(body)
    return body


async def streamed(app: ScriptedApp, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked against Anthropic's type."""
    response = await app.http.post("/v1/messages", json=ASKED | fields | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENTS.validate_python(event)
        found.append(event)
    return found


def summed(streamed: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events add up to, by Anthropic's documentation."""
    assert (streamed[0]["type"], streamed[-1]["type"]) == ("message_start", "message_stop")
    message: dict[str, Any] = streamed[0]["message"]
    inputs: dict[int, str] = {}
    for event in streamed[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two requests; the ids of calls are random."""
    left = {name: value for name, value in message.items() if name not in ("id", "timings", "stop_details")}
    return left | {"content": [{**block, "id": None} for block in message["content"]]}


ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("Good day to you", {}),
    "reasoning": ("<think>\nLet me see.\n</think>\n\nIt is 4.", {"thinking": THINKING}),
    "call": (f"Let me look.\n{CALL}", {"tools": TOOLS}),
    "all": (f"<think>Two calls</think>Well:{CALL}\n{CALL}", {"tools": TOOLS, "thinking": THINKING}),
    "nothing": (" ", {}),
}


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("name", ANSWERS)
async def test_a_stream_adds_up_to_the_whole_message(serving: Serving, name: str, group: int) -> None:
    text, fields = ANSWERS[name]
    app = serving(text, group=group, cached=1)
    message = await whole(app, **fields)
    assert comparable(summed(await streamed(app, **fields))) == comparable(message)
    async with client_of(app) as client:
        async with client.messages.stream(**ASKED, **fields) as stream:
            final = await stream.get_final_message()
        asked = await client.messages.create(**ASKED, **fields)
    assert comparable(final.to_dict()) == comparable(asked.to_dict()) == comparable(message)


async def test_blocks_and_stop_reason_of_a_call(serving: Serving) -> None:
    message = await whole(serving(ANSWERS["all"][0]), **ANSWERS["all"][1])
    thinking, text, first, second = message["content"]
    assert (thinking["thinking"], text["text"]) == ("Two calls", "Well:")
    assert first["input"] == second["input"] == {"city": "Paris"}
    assert first["id"] != second["id"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_omitted_thinking_is_empty(serving: Serving) -> None:
    app = serving(ANSWERS["reasoning"][0])
    thinking = {**THINKING, "display": "omitted"}
    message = await whole(app, thinking=thinking)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert comparable(summed(await streamed(app, thinking=thinking))) == comparable(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "fields", "stop"),
    [
        ("stop", {}, ("end_turn", None)),
        ("stop", {"stop_sequences": ["x", " day"]}, ("stop_sequence", " day")),
        ("length", {}, ("max_tokens", None)),
        ("length", {"max_tokens": 10**9}, ("model_context_window_exceeded", None)),
    ],
)
async def test_stop_reasons(serving: Serving, stream: bool, reason: str, fields: Any, stop: Any) -> None:
    app = serving("Good day to you", reason=reason)
    message = summed(await streamed(app, **fields)) if stream else await whole(app, **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == stop
    assert message["content"][0]["text"] == ("Good" if stop[1] else "Good day to you")


async def test_a_call_that_is_cut_off_is_not_to_be_run(serving: Serving) -> None:
    app = serving(CALL[: CALL.index("ris")], reason="length")
    message = await whole(app, tools=TOOLS)
    assert (message["stop_reason"], message["content"][0]["input"]) == ("max_tokens", {})


async def test_usage_tells_what_was_cached(serving: Serving, tokenizer: Tokenizer) -> None:
    app = serving("Good day", cached=5)
    message = await whole(app)
    (request,) = app.engine.requests
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(request.prompt_ids)
    assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (5, 0)
    assert usage["output_tokens"] == len(tokenizer.encode("Good day", add_special_tokens=False))
    start = (await streamed(app))[0]["message"]["usage"]
    assert (start["input_tokens"], start["cache_read_input_tokens"]) == (len(request.prompt_ids), 0)


async def test_what_is_asked_reaches_the_engine(serving: Serving) -> None:
    app = serving("Good day")
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.1}
    await whole(app, **given, speculation="off", metadata={"user_id": "u"}, max_tokens=9)
    (request,) = app.engine.requests
    assert {name: getattr(request.params, name) for name in given} == given
    assert (request.params.max_tokens, request.speculation) == (9, "off")


async def test_max_tokens_of_0_only_computes_the_prompt(serving: Serving) -> None:
    app = serving("Good", reason="length")
    message = await whole(app, max_tokens=0)
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 0)
    assert message["content"][0]["text"] == ""
    assert app.engine.requests[0].params.max_tokens == 1


async def test_the_answer_goes_on_with_a_last_message_of_the_assistant(serving: Serving, tokenizer: Tokenizer) -> None:
    app = serving("Good day")
    await whole(app, messages=[*ASKED["messages"], {"role": "assistant", "content": "Well, "}])
    assert tokenizer.decode(app.engine.requests[0].prompt_ids, False).endswith("assistant\nWell, ")


async def test_headers_of_versions_and_betas_are_accepted(serving: Serving) -> None:
    async with client_of(serving("Good day")) as client:
        made = await client.beta.messages.create(**ASKED, betas=["files-api-2025-04-14", "no-such-beta"])
    assert made.content[0].text == "Good day"


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"system": "Be brief."}], ids=str)
async def test_counting_tokens(serving: Serving, fields: dict[str, Any]) -> None:
    app = serving("Good day")
    async with client_of(app) as client:
        counted = await client.messages.count_tokens(**{name: ASKED[name] for name in ("model", "messages")}, **fields)
    await whole(app, **fields)
    assert counted.input_tokens == len(app.engine.requests[0].prompt_ids)


async def test_counting_is_not_bounded_by_the_context(serving: Serving) -> None:
    messages = [{"role": "user", "content": "day " * 2000}]
    response = await serving("").http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": messages})
    assert response.json()["input_tokens"] >= 2000


async def test_pings_come_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(events, "PING_SECONDS", 0.01)
    go = asyncio.Event()
    app = ScriptedApp(lambda request: [go, *say(request, [5], [6])], tokenizer=tokenizer)
    app.engine.info = msgspec.structs.replace(INFO, max_model_len=1024)

    async def after_a_while() -> None:
        for _ in range(8):  # one after the other, so that the pings between them come on a busy machine, too
            await asyncio.sleep(0.02)
        go.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(after_a_while())
        stream = tasks.create_task(streamed(app))
    kinds = [event["type"] for event in stream.result()]
    begin = kinds.index("content_block_start")
    assert kinds[:3] == ["message_start", "ping", "ping"]
    assert set(kinds[1:begin]) == {"ping"}
    assert kinds[-1] == "message_stop"
    assert "ping" not in (await app.chat(stream=True)).text
