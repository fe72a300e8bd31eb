"""SIGTERM with streams running: they finish, new requests are refused, and a second signal stops the server."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process

STREAMS = 16

Start = Callable[..., RunningServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*flags)`: a server that is ready, in a process group of its own."""
    started: list[RunningServer] = []

    def make(*flags: str) -> RunningServer:
        own = ("--max-num-seqs", str(STREAMS), *flags)
        started.append(RunningServer(tmp_path / f"log{len(started)}", *own, own_group=True))
        started[-1].wait_for("/ready", 200)
        return started[-1]

    yield make
    for server in started:
        server.stop()


class Streams:
    """Streams on a server, each of so many tokens."""

    def __init__(self, server: RunningServer, tokens: int, model: str) -> None:
        self._http = httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None))
        self._body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self._body["stream_options"] = {"include_usage": True}
        self.begun: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[list[dict[str, Any]]]] = []

    def open(self, prompt: str) -> None:
        begun = asyncio.Event()
        self.begun.append(begun)
        self.tasks.append(asyncio.create_task(self._read(prompt, begun)))

    async def all_begun(self) -> None:
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in self.begun)), 60)

    async def chunks(self) -> list[list[dict[str, Any]]]:
        return await asyncio.wait_for(asyncio.gather(*self.tasks), 120)

    async def ask(self, path: str, **body: Any) -> httpx.Response:
        return await self._http.request("POST" if body else "GET", path, json=body or None)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._http.aclose()

    async def _read(self, prompt: str, begun: asyncio.Event) -> list[dict[str, Any]]:
        chunks = []
        async with self._http.stream("POST", "/v1/completions", json={**self._body, "prompt": prompt}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    begun.set()
        return chunks


@pytest.mark.real_model
@pytest.mark.parametrize("group", [False, True], ids=["the server", "the process group"])
async def test_sixteen_streams_finish_and_a_seventeenth_is_refused(start: Start, group: bool) -> None:
    running = start("--kv-cache-memory", "256MiB")
    engine = running.engine
    streams = Streams(running, 48, "smollm2-135m")
    try:
        for i in range(STREAMS):
            streams.open(f"Number {i} is")
        await streams.all_begun()
        engine.suspend()  # so that no answer is complete before what follows has been seen
        if group:
            running.signal_group(signal.SIGTERM)
        else:
            running.process.send_signal(signal.SIGTERM)
        while (await streams.ask("/health")).status_code == 200:
            ready = await streams.ask("/ready")
            if ready.status_code == 503:
                break
        assert ready.json()["status"] == "server_stopping"
        refused = await streams.ask("/v1/completions", model="smollm2-135m", prompt="One more")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        assert int(refused.headers["retry-after"]) > 0
        assert not all(task.done() for task in streams.tasks)  # else this has shown nothing
        metrics = (await streams.ask("/metrics")).text
        assert "pilotfish_engine_up 0.0" in metrics
        engine.resume()
        for chunks in await streams.chunks():
            assert chunks[-1]["usage"]["completion_tokens"] == 48
            assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert await asyncio.to_thread(running.process.wait, 60) == 0
        assert not engine.is_running()
        said = running.log.read_text()
        assert "16 answers may take" in said
        assert "All answers are finished" in said
        assert "Traceback" not in said
    finally:
        await streams.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_second_signal_ends_at_once(start: Start, tiny_llama: Path, number: signal.Signals) -> None:
    running = start("--model", str(tiny_llama), "--kv-cache-memory", "16MiB", "--drain-timeout", "3600")
    engine = running.engine
    streams = Streams(running, 2000, MODEL)
    try:
        for i in range(8):
            streams.open(f"{i}")
        await streams.all_begun()
        running.signal_group(signal.SIGTERM)
        await asyncio.to_thread(running.wait_for, "/ready", 503)
        running.signal_group(number)
        assert await asyncio.to_thread(running.process.wait, 60) == 128 + number
        assert not engine.is_running()
        assert "Stopping now" in running.log.read_text()
        assert "Traceback" not in running.log.read_text()
    finally:
        await streams.close()


async def test_requests_left_after_the_drain_timeout_end_with_an_error(start: Start, tiny_llama: Path) -> None:
    running = start("--model", str(tiny_llama), "--kv-cache-memory", "16MiB", "--drain-timeout", "0.3")
    streams = Streams(running, 2000, MODEL)
    try:
        for i in range(3):
            streams.open(f"{i}")
        whole = asyncio.create_task(
            streams.ask("/v1/completions", model=MODEL, prompt="b", max_tokens=2000, ignore_eos=True)
        )
        await streams.all_begun()
        await asyncio.to_thread(running.wait_until, lambda: running.metric("pilotfish_sequences_running") == 4)
        running.signal_group(signal.SIGTERM)
        for chunks in await streams.chunks():
            assert chunks[-1]["error"]["code"] == "server_stopping"
            assert "before it was complete" in chunks[-1]["error"]["message"]
        response = await whole
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_stopping")
        assert await asyncio.to_thread(running.process.wait, 60) == 0
    finally:
        await streams.close()


async def test_a_signal_while_the_model_loads_ends_it(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(tmp_path / "log", "--model", str(tiny_llama), own_group=True)
    try:
        running.wait_until(lambda: bool(psutil.Process(running.process.pid).children()))
        await asyncio.to_thread(running.wait_until, lambda: running.status("/health") == 200)
        running.signal_group(signal.SIGTERM)
        assert await asyncio.to_thread(running.process.wait, 60) == 0
        assert "Traceback" not in running.log.read_text()
    finally:
        running.stop()
