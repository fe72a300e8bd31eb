"""Lifecycle of a server: loading, draining, an engine that is killed or cannot start."""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pilotfish.checkpoints.catalog import ModelFiles
from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process


def test_loading_then_ready_then_an_engine_killed_in_mid_request(tiny_llama: Path, tmp_path: Path) -> None:
    """Without restarts, the server says that it has to be restarted itself."""
    running = RunningServer(
        tmp_path / "log", "--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--api-key", "sesame",
        "--served-model-name", "fish", "--speculation", "none", "--engine-restarts", "0",
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
            assert "the engine process was ended by SIGKILL" in running.log.read_text()
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


@pytest.mark.real_model
def test_an_engine_killed_under_16_streams_is_up_again_in_10_seconds(smollm2: ModelFiles, tmp_path: Path) -> None:
    """Streams that had begun are told to come back, those that had not do not notice, and their texts are the same."""
    running = RunningServer(
        tmp_path / "log", "--model", str(smollm2.path), "--max-num-seqs", "8", "--served-model-name", "fish"
    )
    try:
        running.wait_for("/ready", 200)
        asked = [{"model": "fish", "prompt": f"Number {i} is", "max_tokens": 24, "seed": i} for i in range(16)]
        with ThreadPoolExecutor(16) as threads:
            alone = [_stream(running, body) for body in asked]
            assert {error for _, error in alone} == {None}
            long = [body | {"max_tokens": 2000, "ignore_eos": True} for body in asked[:8]]
            begun = [threads.submit(_stream, running, body) for body in long]
            running.wait_until(lambda: running.metric("pilotfish_sequences_running") == 8)
            waiting = [threads.submit(_stream, running, body) for body in asked[8:]]
            running.wait_until(lambda: running.metric("pilotfish_sequences_waiting") == 8)
            killed = time.monotonic()
            running.engine.kill()
            running.wait_for("/ready", 503)
            assert running.http.get("/ready").json()["status"] == "engine_restarting"
            assert running.status("/health") == 200
            refused = running.http.post("/v1/completions", json=asked[0])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
            assert refused.json()["error"]["type"] == "server_error"
            assert int(refused.headers["retry-after"]) > 0
            assert running.metric("pilotfish_engine_up") == 0
            running.wait_for("/ready", 200)
            seconds = time.monotonic() - killed
            cut = [future.result() for future in begun]
            assert [error for _, error in cut] == ["engine_restarting"] * 8
            assert all(text for text, _ in cut)
            assert [future.result() for future in waiting] == alone[8:]
            assert [_stream(running, body) for body in asked[:2]] == alone[:2]
        assert seconds < 10
        assert running.metric("pilotfish_engine_restarts_total") == 1
        assert running.metric("pilotfish_requests_replayed_total") == 8
        assert running.metric("pilotfish_engine_up") == 1
        assert (
            "It is restarted (1 of at most 5 times within 600 s); 16 requests were in flight" in running.log.read_text()
        )
    finally:
        running.stop()


def _stream(running: RunningServer, body: dict[str, Any]) -> tuple[str, str | None]:
    """The text of a streamed answer, and the code of the error that ended it."""
    text = ""
    with running.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return text, event["error"]["code"]
                text += event["choices"][0]["text"] if event["choices"] else ""
    return text, None
