"""The log: a line for each request, in both formats, from both processes, with prompts only on request."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.logs import JsonFormatter, TextFormatter, fields
from tests.support.running_server import MODEL, RunningServer

SECRET = "The safe opens with seven"


def record(message: str, **own: Any) -> logging.LogRecord:
    made = logging.LogRecord("a.logger", logging.INFO, __file__, 1, message, (), None)
    made.__dict__.update(fields(**own))
    return made


@given(message=st.text(), value=st.one_of(st.text(), st.floats(allow_nan=False), st.integers(), st.booleans()))
def test_a_message_is_one_line_whatever_is_in_it(message: str, value: Any) -> None:
    line = JsonFormatter().format(record(message, value=value, nothing=None))
    assert "\n" not in line
    read = json.loads(line)
    assert (read["message"], read["value"], read["level"], read["logger"]) == (message, value, "info", "a.logger")
    assert "nothing" not in read
    assert read["time"].endswith("Z")
    assert "\n" not in TextFormatter().format(record("a", value=value))


def test_an_exception_is_in_its_line() -> None:
    made = record("it failed")
    try:
        raise RuntimeError("why")
    except RuntimeError:
        made.exc_info = sys.exc_info()
    assert "RuntimeError: why" in json.loads(JsonFormatter().format(made))["exception"]


def lines_of(running: RunningServer) -> list[dict[str, Any]]:
    """Return the lines of the log, each of which must be an object."""
    return [json.loads(line) for line in running.log.read_text().splitlines()]


def requests_of(running: RunningServer) -> list[dict[str, Any]]:
    return [line for line in lines_of(running) if line["logger"] == "server.requests"]


@pytest.fixture
def running(tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    flags = ["--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--log-format", "json", *request.param]
    made = RunningServer(tmp_path / "log", *flags)
    made.wait_for("/ready", 200)
    yield made
    made.stop()


@pytest.mark.process
@pytest.mark.parametrize("running", [()], indirect=True, ids=["json"])
def test_every_line_is_json_and_each_request_has_one(running: RunningServer) -> None:
    headers = {"x-request-id": "mine-1"}
    with running.client() as client:
        prompt = f"{SECRET} {SECRET} {SECRET}"
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "extra_body": {"ignore_eos": True}}
        done = client.completions.create(**asked, max_tokens=20, extra_headers=headers)
        list(client.completions.create(**asked, max_tokens=5, stream=True, n=2))
        left = client.completions.create(**asked, max_tokens=1500, stream=True)
        next(iter(left))
        left.close()
        # The server notices that this client has left at some later time: its line comes before the next request's.
        running.wait_until(lambda: len(requests_of(running)) == 3)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=prompt, temperature=9)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=SECRET, prompt="a")
    running.http.get("/nowhere")
    running.wait_until(lambda: len(requests_of(running)) == 6)
    first, second, third, fourth, fifth, sixth = requests_of(running)
    timings = (done.model_extra or {})["timings"]
    assert done.usage is not None
    wanted = {
        "request_id": "mine-1", "id": done.id, "model": MODEL, "status": 200, "method": "POST", "answers": 1,
        "path": "/v1/completions", "prompt_tokens": done.usage.prompt_tokens, "tokens": 20, "finish_reason": "length",
        "stream": False, "drafter": timings["drafter"], "drafted_tokens": timings["drafted_tokens"],
        "accepted_tokens": timings["accepted_tokens"], "ttft_ms": timings["ttft_ms"],
        "tokens_per_second": timings["tokens_per_second"], "level": "info", "client": "127.0.0.1",
    }  # fmt: skip
    assert {name: first.get(name) for name in wanted} == wanted
    if timings["drafted_tokens"]:
        assert first["acceptance"] == pytest.approx(timings["accepted_tokens"] / timings["drafted_tokens"], abs=1e-3)
    assert first["duration_ms"] >= first["ttft_ms"]
    assert (second["answers"], second["tokens"], second["stream"]) == (2, 10, True)
    assert third["finish_reason"] == "abort"
    assert (fourth["status"], fourth["error"]) == (400, "invalid_value")
    assert (fifth["status"], fifth["error"]) == (404, "model_not_found")
    assert (sixth["status"], sixth["path"]) == (404, "/nowhere")
    loggers = {line["logger"] for line in lines_of(running)}
    messages = [line["message"] for line in lines_of(running)]
    assert "pilotfish.server.console" in loggers
    assert any(message.startswith("loading llama: ") for message in messages)
    assert any(message.startswith("Ready in ") for message in messages)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    assert lines_of(running)[-1]["message"] == "Stopping"
    assert SECRET not in running.log.read_text()


@pytest.mark.process
@pytest.mark.parametrize("running", [("--log-prompts",)], indirect=True, ids=["prompts"])
def test_prompts_are_logged_on_request(running: RunningServer) -> None:
    with running.client() as client:
        client.completions.create(model=MODEL, prompt=[SECRET, "and this"], max_tokens=3)
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": SECRET}], max_tokens=3)
    running.wait_until(lambda: len(requests_of(running)) == 2)
    completion, chat = requests_of(running)
    assert [SECRET in completion["prompts"][0], "and this" in completion["prompts"][1]] == [True, True]
    assert SECRET in chat["prompts"][0]


@pytest.mark.process
def test_text_has_a_line_for_each_request_and_none_for_probes(server: RunningServer) -> None:
    before = len(server.log.read_text().splitlines())
    for _ in range(3):
        assert server.http.get("/ready").status_code == 200
        assert server.http.get("/metrics").status_code == 200
    with server.client() as client:
        client.completions.create(model=MODEL, prompt=SECRET, max_tokens=4, extra_headers={"x-request-id": "mine-2"})
    server.wait_until(lambda: "mine-2" in server.log.read_text())
    added = server.log.read_text().splitlines()[before:]
    assert len(added) == 1
    for part in ("server.requests", "request_id=mine-2", "status=200", "tokens=4", "drafter=", "ttft_ms="):
        assert part in added[0]
    assert SECRET not in added[0]
