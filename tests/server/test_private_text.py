"""What clients write is in no log, metric or trace, whatever becomes of their requests, unless it is asked for.

A marker stands in every place of every endpoint that takes a text, in requests that work and in such as fail in as many
ways as can be thought of; then it is looked for.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.test_tracing import Receiver
from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process

MARKER = "quagswagger"
"""No word of any model, message or module."""
SAID = f"Tell nobody of the {MARKER}, nor of its \n second line."
SCHEMA = {
    "type": "object",
    "description": MARKER,
    "properties": {"a": {"enum": [MARKER, "b"], "description": MARKER}},
    "required": ["a"],
}
FUNCTION = {"name": f"f_{MARKER}", "description": MARKER, "parameters": SCHEMA}
CHAT = [
    {"role": "system", "content": SAID},
    {"role": "user", "content": [{"type": "text", "text": SAID}], "name": MARKER},
    {"role": "assistant", "content": SAID},
    {"role": "user", "content": SAID},
]
SHORT = {"model": MODEL, "max_tokens": 3}

GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        SHORT | {"prompt": [SAID, SAID], "stop": [MARKER]},
        SHORT | {"prompt": SAID, "echo": True, "logprobs": 2, "prediction": {"type": "content", "content": SAID}},
        SHORT | {"prompt": SAID, "guided_choice": [MARKER, "b"]},
        SHORT | {"prompt": SAID, "guided_regex": f"{MARKER}[ab]"},
    ],
    "/v1/chat/completions": [
        SHORT | {"messages": CHAT, "stream": True},
        SHORT | {"messages": CHAT, "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
        SHORT
        | {
            "messages": CHAT,
            "response_format": {"type": "json_schema", "json_schema": {"name": MARKER, "schema": SCHEMA}},
        },
        SHORT | {"messages": CHAT, "metadata": {"a": MARKER}, "user": "somebody"},
        SHORT | {"messages": CHAT, "chat_template_kwargs": {"a": MARKER}},
    ],
    "/v1/responses": [
        {"model": MODEL, "max_output_tokens": 16, "input": SAID, "instructions": SAID, "metadata": {"a": MARKER}},
        {"model": MODEL, "max_output_tokens": 16, "input": [{"role": "user", "content": SAID}], "stream": True},
    ],
    "/v1/messages": [
        SHORT | {"messages": [{"role": "user", "content": SAID}], "system": SAID, "stop_sequences": [MARKER]},
        SHORT
        | {
            "messages": [{"role": "user", "content": SAID}],
            "tools": [{"name": f"f_{MARKER}", "description": MARKER, "input_schema": SCHEMA}],
        },
    ],
    "/v1/messages/count_tokens": [{"model": MODEL, "messages": [{"role": "user", "content": SAID}]}],
    "/tokenize": [{"model": MODEL, "prompt": SAID}, {"model": MODEL, "messages": CHAT}],
    "/detokenize": [{"model": MODEL, "tokens": [5, 6, 7]}],
}
"""Requests that work."""

WRONG: list[dict[str, Any]] = [
    {"model": MARKER},
    {"temperature": MARKER},
    {"max_tokens": MARKER},
    {"stream": SAID},
    {"n": [MARKER]},
    {"prompt": {"a": SAID}},
    {"prompt": SAID * 5000},
    {"input": {"a": SAID}},
    {"messages": SAID},
    {"messages": [SAID]},
    {"messages": [{"role": MARKER, "content": SAID}]},
    {"messages": [{"role": "user", "content": {"a": MARKER}}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": MARKER}}]}]},
    {"messages": [{"role": "user", "content": [{"type": MARKER}]}]},
    {"messages": [{"role": "user", "content": SAID * 5000}]},
    {"messages": [{"role": "user", "content": f"\ud800 {MARKER}"}]},
    {"prompt": f"\ud800 {MARKER}"},
    {"tools": [{"type": MARKER}]},
    {"tools": [{"type": "function", "function": FUNCTION | {"parameters": {"type": MARKER}}}]},
    {"tools": MARKER},
    {"tool_choice": MARKER},
    {"response_format": {"type": MARKER}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": MARKER}}}},
    {"guided_regex": f"({MARKER}"},
    {"guided_grammar": f"root ::= {MARKER}"},
    {"guided_json": {"type": "object", "properties": {MARKER: {"type": MARKER}}}},
    {"logit_bias": {MARKER: 1}},
    {"speculation": MARKER},
    {"stop": [SAID, {"a": MARKER}]},
    {"previous_response_id": f"resp_{MARKER}"},
    {"prediction": {"type": MARKER, "content": MARKER}},
    {"unknown_field": MARKER},
    {"priority": MARKER, "timeout": MARKER},
]
"""What makes of a good request a bad one, for one endpoint or another."""

BODIES = [f'{{"prompt": "{MARKER}', f'["{MARKER}"]', f'"{MARKER}"', f'{{"prompt": {MARKER}}}', "[" * 5000 + MARKER]
"""Bodies that are no requests."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def start(folder: Path, model: Path, receiver: Receiver, *flags: str) -> RunningServer:
    made = RunningServer(
        folder / "log", "--model", str(model), "--kv-cache-memory", "8MiB", "--otlp-endpoint", receiver.url,
        "--lora-updates", *flags, variables={"OTEL_BSP_SCHEDULE_DELAY": "100"},
    )  # fmt: skip
    made.wait_for("/ready", 200)
    return made


@pytest.fixture(scope="module")
def running(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[RunningServer]:
    made = start(tmp_path_factory.mktemp("private"), tiny_llama, receiver, "--log-level", "debug")
    yield made
    made.stop()


def where_it_is(running: RunningServer, receiver: Receiver) -> list[str]:
    """The places in which the marker is."""
    time.sleep(0.5)  # spans are sent every tenth of a second
    metrics = running.http.get("/metrics").text
    places = {
        "log": running.log.read_text(),
        "/metrics": metrics,
        "/page/requests": running.http.get("/page/requests").text,
        "/v1/loads": running.http.get("/v1/loads").text,
        "spans": "".join(map(str, receiver.spans)),
    }
    assert receiver.spans, "no trace has come"
    assert "POST" in places["log"], "requests are not logged"
    return [f"{place}: {line[:300]}" for place, text in places.items() for line in text.splitlines() if MARKER in line]


def test_all_endpoints_are_tried(running: RunningServer) -> None:
    """All that take a text by POST: an endpoint that is new has to be added above."""
    paths = running.http.get("/openapi.json").json()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods}
    others = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/responses/{response_id}/cancel", "/drain", "/"}
    assert posts - others == set(GOOD)


def test_requests_that_work(running: RunningServer, receiver: Receiver) -> None:
    for path, bodies in GOOD.items():
        for body in bodies:
            answer = running.http.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
    answer = running.http.post("/v1/completions", json=SHORT | {"prompt": "a", "max_tokens": 2000, "stop": [MARKER]})
    assert answer.status_code in (200, 400)
    assert where_it_is(running, receiver) == []


def test_requests_that_fail(running: RunningServer, receiver: Receiver) -> None:
    statuses = set()
    for (path, bodies), wrong in itertools.product(GOOD.items(), WRONG):
        content = json.dumps(bodies[0] | wrong)
        statuses.add(running.http.post(path, content=content, headers={"content-type": "application/json"}).status_code)
    for path, body in itertools.product(GOOD, BODIES):
        answer = running.http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, body[:20])
    for name in ("load_lora_adapter", "unload_lora_adapter"):
        named = {"lora_name": "a", "lora_path": "/nowhere"}
        assert running.http.post(f"/v1/{name}", json=named | {"prompt": SAID}).status_code == 400
    assert statuses <= {200, 400, 404, 413, 422}
    assert 400 in statuses
    assert where_it_is(running, receiver) == []


def test_requests_that_end_early(running: RunningServer, receiver: Receiver) -> None:
    """Clients that leave, a deadline, and an engine that dies."""
    long = {"model": MODEL, "prompt": SAID, "max_tokens": 1500, "ignore_eos": True}
    with running.http.stream("POST", "/v1/completions", json=long | {"stream": True}) as response:
        next(response.iter_lines())
    running.http.post("/v1/completions", json=long | {"timeout": 0.05})
    other = httpx.Client(base_url=running.url, timeout=60)
    with other, other.stream("POST", "/v1/completions", json=long | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        running.engine.kill()
        assert any("error" in line for line in lines)
    running.wait_for("/ready", 200)
    assert where_it_is(running, receiver) == []


def test_it_would_be_found(tiny_llama: Path, tmp_path: Path, receiver: Receiver) -> None:
    asked = start(tmp_path, tiny_llama, receiver, "--log-prompts")
    try:
        assert asked.http.post("/v1/completions", json=SHORT | {"prompt": SAID}).status_code == 200
        assert {found.partition(":")[0] for found in where_it_is(asked, receiver)} == {"log", "/page/requests"}
    finally:
        asked.stop()
