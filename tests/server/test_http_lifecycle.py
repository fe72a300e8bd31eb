"""Lifecycle of a server: loading, draining, an engine that is killed or cannot start."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process


def test_loading_then_ready_then_an_engine_killed_in_mid_request(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(
        tmp_path / "log", "--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--api-key", "sesame",
        "--served-model-name", "fish", "--speculation", "none",
    )  # fmt: skip
    try:
        running.wait_for("/ready", 503)
        assert running.status("/health") == 200
        with running.client(api_key="sesame") as client:
            with pytest.raises(openai.InternalServerError) as loading:
                client.completions.create(model="fish", prompt="a")
            assert (loading.value.status_code, loading.value.code) == (503, "model_loading")
            assert int(loading.value.response.headers["retry-after"]) > 0
            running.wait_for("/ready", 200)
            with pytest.raises(openai.AuthenticationError) as refused, running.client(api_key="wrong") as stranger:
                stranger.completions.create(model="fish", prompt="a")
            assert refused.value.code == "invalid_api_key"
            assert running.status("/v1/models") == 401
            asked: dict[str, Any] = {
                "model": "fish",
                "prompt": "a",
                "max_tokens": 2000,
                "extra_body": {"ignore_eos": True},
            }
            stream = client.completions.create(**asked, stream=True)
            next(iter(stream))
            failed: list[Exception] = []

            def wait() -> None:
                try:
                    client.completions.create(**asked)
                except openai.InternalServerError as error:
                    failed.append(error)

            waiting = threading.Thread(target=wait)
            waiting.start()
            running.wait_until(lambda: running.metric("pilotfish_sequences_running") == 2)
            running.engine.kill()
            with pytest.raises(openai.APIError) as broken:
                list(stream)
            assert broken.value.code == "engine_dead"
            waiting.join(10)
            (error,) = failed
            assert isinstance(error, openai.InternalServerError)
            assert error.code == "engine_dead"
            assert running.status("/health") == 503
            assert running.status("/ready") == 503
            assert running.metric("pilotfish_kv_blocks_used") == 0
            with pytest.raises(openai.InternalServerError) as dead:
                client.completions.create(**asked)
            assert dead.value.status_code == 503
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(15) == 0
    finally:
        running.stop()


@pytest.mark.parametrize("allowed", [30.0, 0.5])
def test_sigterm_lets_answers_finish_for_a_while(tiny_llama: Path, tmp_path: Path, allowed: float) -> None:
    flags = ("--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--drain-timeout", str(allowed))
    running = RunningServer(tmp_path / "log", *flags)
    try:
        running.wait_for("/ready", 200)
        engine = running.engine
        length = 400 if allowed > 1 else 2000
        body = {"model": MODEL, "prompt": [9, 3], "max_tokens": length, "stream": True, "ignore_eos": True}
        body |= {"speculation": "off", "stream_options": {"include_usage": True}}
        other = httpx.Client(base_url=running.url)
        with other, running.http.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            assert other.get("/ready").status_code == 200
            if allowed > 1:
                engine.suspend()  # so that the answer cannot be complete before what follows has been seen
            running.process.send_signal(signal.SIGTERM)
            while (answer := other.get("/ready")).status_code == 200:
                time.sleep(0.01)
            assert answer.json()["status"] == "server_stopping"
            refused = other.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
            assert int(refused.headers["retry-after"]) > 0
            if allowed > 1:
                engine.resume()
            *_, last, done = lines
        assert done == "data: [DONE]"
        chunk = json.loads(last.removeprefix("data: "))
        if allowed > 1:
            assert chunk["usage"]["completion_tokens"] == length
        else:
            assert chunk["error"]["code"] == "server_stopping"
            assert "before it was complete" in chunk["error"]["message"]
        assert running.process.wait(15) == 0
        assert not engine.is_running()
        assert "Traceback" not in running.log.read_text()
    finally:
        running.stop()


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(tmp_path / "log", "--model", str(tiny_llama), "--kv-cache-memory", "1KiB")
    try:
        assert running.process.wait(60) == 1
        said = running.log.read_text()
        assert "the engine could not start" in said
        assert "Traceback" not in said
    finally:
        running.stop()
