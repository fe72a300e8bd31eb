"""SupervisedEngine: a process that dies is started again, requests that had produced nothing are sent once more, and
all others hear of it. With a core that only counts (fake_engine.py)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process.supervisor import EngineEvents, RestartPolicy, SupervisedEngine
from pilotfish.engine.request import Delta, Request
from pilotfish.errors import EngineDeadError, EngineNotReadyError, EngineRestartingError
from tests.support.fake_engine import EXIT
from tests.support.paths import SUPPORT

pytestmark = pytest.mark.process

ENDLESS = 1_000_000
HANG_SECONDS = 60.0

Make = Callable[..., Awaitable[SupervisedEngine]]


@pytest.fixture
def seen() -> list[str]:
    """The events of the engine, in order."""
    return []


@pytest.fixture
async def make(tmp_path: Path, sockets: Path, seen: list[str]) -> AsyncIterator[Make]:
    engines: list[SupervisedEngine] = []

    async def made(most: int = 5, window: float = 600.0, model: str = "fake") -> SupervisedEngine:
        events = EngineEvents(
            ready=lambda info: seen.append("ready"),
            restarting=lambda: seen.append("restarting"),
            replayed=lambda: seen.append("replayed"),
        )
        command = [sys.executable, str(SUPPORT / "fake_engine.py"), str(tmp_path / "events")]
        engine = SupervisedEngine(EngineConfig(model=model), RestartPolicy(most, window), events, command=command)
        engines.append(engine)
        await engine.start()
        return engine

    yield made
    for engine in engines:
        await engine.stop()
    assert not left_in(sockets)


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def request(id: str = "r", first: int = 0, max_tokens: int = 5) -> Request:
    return Request(id=id, prompt_ids=(first,), params=SamplingParams(max_tokens=max_tokens))


async def collect(engine: SupervisedEngine, one: Request) -> list[int]:
    return [token async for delta in engine.generate(one) for token in delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def process_of(engine: SupervisedEngine) -> psutil.Process:
    assert engine.pid is not None
    return psutil.Process(engine.pid)


def noted(tmp_path: Path, what: str) -> list[str]:
    """What the cores were asked to do that begins so."""
    return [line for line in (tmp_path / "events").read_text().splitlines() if line.startswith(what)]


async def test_what_had_begun_hears_of_the_end_and_what_had_not_does_not(
    make: Make, seen: list[str], tmp_path: Path
) -> None:
    engine = await make()
    await engine.wait_ready()
    begun = engine.generate(request("begun", max_tokens=ENDLESS))
    await anext(begun)
    process = process_of(engine)
    process.suspend()
    waiting = [asyncio.create_task(collect(engine, request(f"w{i}", first=100 * i))) for i in range(4)]
    left = asyncio.create_task(collect(engine, request("left")))
    await until(lambda: engine.in_flight == 6)
    process.kill()
    with pytest.raises(EngineRestartingError, match="SIGKILL") as told:
        async for _ in begun:
            pass
    assert 0 < told.value.retry_after < 60
    assert (engine.state, engine.info is not None) == ("restarting", True)
    left.cancel()
    late = asyncio.create_task(collect(engine, request("late", first=7)))  # it was admitted before
    assert await asyncio.gather(*waiting) == [list(range(100 * i, 100 * i + 5)) for i in range(4)]
    assert await late == list(range(7, 12))
    assert engine.state == "ready"
    assert (seen[:2], seen[-1], len(seen)) == (["ready", "restarting"], "ready", 3 + seen.count("replayed"))
    assert seen.count("replayed") in (4, 5)  # the one that left may have been about to be
    assert await collect(engine, request("begun")) == [0, 1, 2, 3, 4]
    await until(lambda: engine.in_flight == 0)
    # Sent twice at most, with the same seed.
    for i in range(4):
        assert len(set(noted(tmp_path, f"add w{i} "))) == 1
    assert len(noted(tmp_path, "add left ")) <= 1


async def test_a_request_that_ends_every_engine_is_sent_twice(make: Make, seen: list[str], tmp_path: Path) -> None:
    engine = await make()
    await engine.wait_ready()
    with pytest.raises(EngineRestartingError, match="exit code 7"):
        await collect(engine, request("poison", first=EXIT))
    assert len(noted(tmp_path, "add poison ")) == 2
    assert await collect(engine, request("next")) == [0, 1, 2, 3, 4]
    assert seen == ["ready", "restarting", "replayed", "ready", "restarting", "ready"]


async def test_an_engine_that_keeps_dying_is_dead_for_good(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = await make(most=1)
    await engine.wait_ready()
    process_of(engine).kill()
    await until(lambda: engine.state == "restarting")
    await until(lambda: engine.state == "ready")
    begun = engine.generate(request("begun", max_tokens=ENDLESS))
    await anext(begun)
    process_of(engine).kill()
    with pytest.raises(EngineDeadError, match="SIGKILL") as told:
        async for _ in begun:
            pass
    assert not isinstance(told.value, EngineRestartingError)
    assert engine.state == "dead"
    for when in (engine.wait_ready(), collect(engine, request())):
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await when
    assert "has been restarted 1 times within 600 s, and is not again" in caplog.text


async def test_deaths_before_the_window_do_not_count(make: Make) -> None:
    engine = await make(most=1, window=0.001)
    for _ in range(3):
        await until(lambda: engine.state == "ready")
        process_of(engine).kill()
        await until(lambda: engine.state == "restarting")
    await engine.wait_ready()


async def test_without_restarts_the_first_death_is_the_last(make: Make, seen: list[str]) -> None:
    engine = await make(most=0)
    await engine.wait_ready()
    with pytest.raises(EngineDeadError, match="exit code 7"):
        await collect(engine, request(first=EXIT))
    assert (engine.state, seen) == ("dead", ["ready"])


async def test_a_first_start_that_fails_is_not_repeated(make: Make, tmp_path: Path) -> None:
    engine = await make(model="broken")
    with pytest.raises(EngineDeadError, match="no model is called 'broken'"):
        await engine.wait_ready()
    assert engine.state == "dead"
    assert noted(tmp_path, "") == ["loading"]


async def test_stop_ends_a_restart_and_those_that_wait_for_it(make: Make) -> None:
    engine = await make()
    await engine.wait_ready()
    process = process_of(engine)
    process.suspend()
    waiting = asyncio.create_task(collect(engine, request()))
    await until(lambda: engine.in_flight == 1)
    process.kill()
    await until(lambda: engine.state == "restarting")
    await engine.stop()
    with pytest.raises((EngineNotReadyError, EngineDeadError)):
        await waiting
    assert (engine.state, engine.pid) == ("dead", None)


async def test_adapters_are_loaded_again(make: Make, tmp_path: Path) -> None:
    engine = await make()
    await engine.wait_ready()
    await engine.change_adapter("kept", "folder")
    await engine.change_adapter("dropped", "folder")
    await engine.change_adapter("dropped", None)
    process_of(engine).kill()
    await until(lambda: engine.state == "restarting")
    info = await engine.wait_ready()
    assert info.adapters == ("kept",)
    assert noted(tmp_path, "change")[3:] == ["change kept folder"]


async def test_a_closed_stream_ends_its_request(make: Make, tmp_path: Path) -> None:
    engine = await make()
    await engine.wait_ready()
    stream = engine.generate(request("left", max_tokens=ENDLESS))
    first: Delta = await anext(stream)
    assert first.token_ids == (0,)
    await stream.aclose()
    await until(lambda: engine.in_flight == 0)
    assert noted(tmp_path, "abort") == ["abort left"]


def test_the_delays_grow_and_are_bounded() -> None:
    assert [RestartPolicy().delay(recent) for recent in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
