"""AsyncEngine and the engine process: every request ends once, whatever ends first. Most with a core that only counts
(fake_engine.py), the last with a real one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process.client import AsyncEngine
from pilotfish.engine.request import Delta, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ConfigError, EngineDeadError, EngineNotReadyError, ParameterError
from tests.support.fake_engine import EXIT, FAIL
from tests.support.paths import SUPPORT

pytestmark = pytest.mark.process

FAKE_ENGINE = SUPPORT / "fake_engine.py"
ENDLESS = 1_000_000


@pytest.fixture
def folders(sockets: Path) -> Callable[[], list[Path]]:
    """The socket folders that are there now."""
    return lambda: list(sockets.iterdir())


@pytest.fixture
def events(tmp_path: Path) -> Callable[[], list[str]]:
    """What the core was asked to do, so far."""
    return lambda: (tmp_path / "events").read_text().splitlines() if (tmp_path / "events").exists() else []


Make = Callable[..., AsyncEngine]


@pytest.fixture(params=["float32", "float16"], ids=["synchronous", "asynchronous"])
async def make(tmp_path: Path, sockets: Path, request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """`fake_engine` takes the dtype for the kind of its device."""
    dtype = request.param
    engines: list[AsyncEngine] = []

    def make_engine(
        model: str = "fake",
        *,
        seed: int | None = None,
        on_stats: Callable[[StepStats], None] | None = None,
        on_loading: Callable[[str, float], None] | None = None,
        command: list[str] | None = None,
    ) -> AsyncEngine:
        command = command or [sys.executable, str(FAKE_ENGINE), str(tmp_path / "events")]
        engines.append(
            AsyncEngine(EngineConfig(model=model, seed=seed, dtype=dtype), on_stats, on_loading, command=command)
        )
        return engines[-1]

    yield make_engine
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def engine(make: Make) -> AsyncEngine:
    engine = make()
    await engine.start()
    await engine.wait_ready()
    return engine


def request(id: str = "r", first: int = 0, max_tokens: int = 5, seed: int | None = None) -> Request:
    return Request(id=id, prompt_ids=(first,), params=SamplingParams(max_tokens=max_tokens, seed=seed))


async def collect(engine: AsyncEngine, one: Request) -> list[Delta]:
    return [delta async for delta in engine.generate(one)]


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


HANG_SECONDS = 60.0
"""When what has to happen has hung. How soon it happens depends on the machine's other work; no test asks for that."""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def process_of(engine: AsyncEngine) -> psutil.Process:
    assert engine.pid is not None
    return psutil.Process(engine.pid)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# Starting


def test_the_client_needs_no_torch() -> None:
    code = "import sys, pilotfish.engine.process.client; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_start_reports_its_progress_and_ends_ready(make: Make) -> None:
    seen: list[tuple[str, float]] = []
    engine = make(on_loading=lambda what, share: seen.append((what, share)))
    assert (engine.state, engine.pid) == ("starting", None)
    await engine.start()
    assert (engine.state, engine.info) == ("starting", None)
    with pytest.raises(EngineNotReadyError, match="loading"):
        engine.generate(request())
    info = await engine.wait_ready()
    assert (engine.state, engine.info, info.model) == ("ready", info, "fake")
    assert process_of(engine).is_running()
    assert seen == [("reading the script", 0.5), ("reading the script", 1.0)]


async def test_settings_that_contradict_each_other_start_nothing() -> None:
    with pytest.raises(ConfigError, match="ngram_min"):
        AsyncEngine(EngineConfig(ngram_min=9))


async def test_a_model_that_cannot_be_loaded_is_the_reason(make: Make, folders: Callable[[], list[Path]]) -> None:
    engine = make("broken")
    await engine.start()
    with pytest.raises(EngineDeadError, match=r"^no model is called 'broken':$"):
        await engine.wait_ready()
    assert engine.state == "dead"
    with pytest.raises(EngineDeadError, match="broken"):
        engine.generate(request())
    await until(lambda: engine.pid is None and not folders())


async def test_a_process_that_ends_at_once_is_noticed(make: Make) -> None:
    engine = make(command=[sys.executable, "-c", "raise SystemExit(3)"])
    await engine.start()
    with pytest.raises(EngineDeadError, match="exit code 3"):
        await engine.wait_ready()


async def test_a_command_that_does_not_exist_leaves_nothing(make: Make, folders: Callable[[], list[Path]]) -> None:
    engine = make(command=["/no/such/program"])
    with pytest.raises(FileNotFoundError):
        await engine.start()
    assert engine.state == "dead"
    assert not folders()


# Generating


async def test_adapters_change_in_order_and_errors_come_back(engine: AsyncEngine) -> None:
    await asyncio.gather(engine.change_adapter("a", "x"), engine.change_adapter("b", "y"))
    assert engine.info is not None
    assert engine.info.adapters == ("a", "b")
    with pytest.raises(ParameterError, match="no adapter is in 'broken'"):
        await engine.change_adapter("c", "broken")
    await engine.change_adapter("a", None)
    assert engine.info.adapters == ("b",)
    await engine.stop()
    with pytest.raises(EngineNotReadyError):
        await engine.change_adapter("a", "x")


async def test_two_hundred_requests_at_once_each_get_their_own_tokens(engine: AsyncEngine) -> None:
    requests = [request(f"r{i}", first=100 * i, max_tokens=1 + i % 7) for i in range(200)]
    answers = await asyncio.gather(*(collect(engine, one) for one in requests))
    for one, deltas in zip(requests, answers, strict=True):
        assert tokens(deltas) == [one.prompt_ids[0] + i for i in range(one.params.max_tokens)]
        assert [delta.finish_reason for delta in deltas] == [None] * (one.params.max_tokens - 1) + ["length"]
        assert deltas[-1].stats is not None
        assert deltas[-1].stats.generated_tokens == one.params.max_tokens
    assert engine.in_flight == 0


async def test_a_slow_reader_loses_nothing_and_holds_up_nobody(engine: AsyncEngine) -> None:
    slow = engine.generate(request("slow", max_tokens=300))
    first = await anext(slow)
    quick = await collect(engine, request("quick", first=1000, max_tokens=20))
    assert tokens(quick) == list(range(1000, 1020))
    await until(lambda: engine.in_flight == 0)  # the engine has ended both; one is read only now
    rest = [delta async for delta in slow]
    assert tokens([first, *rest]) == list(range(300))


async def test_an_event_loop_that_was_busy_gets_all_that_has_piled_up(make: Make) -> None:
    stats: list[StepStats] = []

    def block_once(one: StepStats) -> None:
        stats.append(one)
        if len(stats) == 1:
            time.sleep(0.5)

    engine = make(on_stats=block_once)
    await engine.start()
    await engine.wait_ready()
    deltas = await asyncio.wait_for(
        collect(engine, request(max_tokens=200)), HANG_SECONDS
    )  # all are there once it wakes
    assert tokens(deltas) == list(range(200))


async def test_each_step_is_reported(make: Make) -> None:
    seen: list[StepStats] = []
    engine = make(on_stats=seen.append)
    await engine.start()
    await engine.wait_ready()
    await collect(engine, request(max_tokens=50))
    assert [stats.generated_tokens for stats in seen] == [1] * 50


async def test_a_callback_that_raises_costs_no_request_its_tokens(make: Make) -> None:
    def refuse(stats: StepStats) -> None:
        raise RuntimeError("not now")

    engine = make(on_stats=refuse)
    await engine.start()
    await engine.wait_ready()
    assert tokens(await collect(engine, request(max_tokens=50))) == list(range(50))


async def test_requests_that_cannot_be_served_are_refused_at_the_call(engine: AsyncEngine) -> None:
    with pytest.raises(ParameterError) as error:
        engine.generate(msgspec.structs.replace(request(), prompt_ids=()))
    assert error.value.param == "prompt"
    with pytest.raises(ParameterError) as error:
        engine.generate(msgspec.structs.replace(request(), speculation="magic"))
    assert error.value.param == "speculation"
    assert engine.in_flight == 0


async def test_an_id_is_taken_until_its_request_has_ended(engine: AsyncEngine) -> None:
    first = engine.generate(request(max_tokens=ENDLESS))
    early = engine.generate(request())  # not sent yet, so the id is still free
    await anext(first)
    with pytest.raises(ParameterError, match="in use"):
        engine.generate(request())
    with pytest.raises(ParameterError, match="in use"):
        await anext(early)
    await first.aclose()
    with pytest.raises(ParameterError, match="in use"):  # the abort is on its way
        engine.generate(request())
    await until(lambda: engine.in_flight == 0)
    assert tokens(await collect(engine, request())) == [0, 1, 2, 3, 4]


async def test_requests_without_a_seed_get_one(make: Make, events: Callable[[], list[str]]) -> None:
    seeds = []
    for seed in (7, 7, 8, None, None):
        engine = make(seed=seed)
        await engine.start()
        await engine.wait_ready()
        before = len(events())
        await collect(engine, request("own", seed=5))
        await collect(engine, request("a"))
        await collect(engine, request("b"))
        await engine.stop()
        seeds.append([event.split("=")[1] for event in events()[before:] if "seed=" in event])
    assert all(each[0] == "5" for each in seeds)
    assert all("None" not in each and each[1] != each[2] for each in seeds)
    assert seeds[0] == seeds[1]
    assert len({tuple(each) for each in seeds}) == 4


# Aborting


async def test_a_closed_generator_aborts_its_request_once(engine: AsyncEngine, events: Callable[[], list[str]]) -> None:
    other = asyncio.create_task(collect(engine, request("other", first=500, max_tokens=100)))
    generator = engine.generate(request(max_tokens=ENDLESS))
    assert (await anext(generator)).token_ids == (0,)
    await generator.aclose()
    await generator.aclose()
    assert tokens(await other) == list(range(500, 600))
    await until(lambda: engine.in_flight == 0)
    assert [event for event in events() if event.startswith("abort")] == ["abort r"]


async def test_a_cancelled_task_aborts_its_request_once(engine: AsyncEngine, events: Callable[[], list[str]]) -> None:
    task = asyncio.create_task(collect(engine, request(max_tokens=ENDLESS)))
    await until(lambda: engine.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.in_flight == 0)
    assert [event for event in events() if event.startswith("abort")] == ["abort r"]


async def test_a_generator_that_is_dropped_aborts_its_request(
    engine: AsyncEngine, events: Callable[[], list[str]]
) -> None:
    async for _ in engine.generate(request(max_tokens=ENDLESS)):
        break
    await until(lambda: engine.in_flight == 0)
    assert [event for event in events() if event.startswith("abort")] == ["abort r"]


async def test_a_finished_or_unstarted_generator_aborts_nothing(
    engine: AsyncEngine, events: Callable[[], list[str]]
) -> None:
    generator = engine.generate(request())
    deltas = [await anext(generator) for _ in range(5)]
    assert deltas[-1].finish_reason == "length"
    await generator.aclose()
    unstarted = engine.generate(request("unstarted"))
    await unstarted.aclose()
    await collect(engine, request("last"))
    assert [event.split()[:2] for event in events()] == [["loading"], ["add", "r"], ["add", "last"]]


# Dying


# Not SIGHUP, which processes started under nohup ignore, as they are asked to.
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGUSR1], ids=lambda sent: sent.name)
async def test_a_process_killed_in_mid_request_ends_every_request(
    engine: AsyncEngine, folders: Callable[[], list[Path]], sent: signal.Signals
) -> None:
    tasks = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=ENDLESS))) for i in range(20)]
    unstarted = engine.generate(request("unstarted"))
    await until(lambda: engine.in_flight == 20)
    process_of(engine).send_signal(sent)
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), HANG_SECONDS):
        assert isinstance(outcome, EngineDeadError)
        assert sent.name in str(outcome)
    with pytest.raises(EngineDeadError, match=sent.name):
        await anext(unstarted)
    assert (engine.state, engine.in_flight, engine.pid) == ("dead", 0, None)
    assert sent.name in (engine.error or "")
    await until(lambda: not folders())


async def test_a_process_killed_while_idle_is_noticed(engine: AsyncEngine) -> None:
    process_of(engine).kill()
    await until(lambda: engine.state == "dead")
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.generate(request())
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await engine.wait_ready()


async def test_a_process_killed_while_it_loads_ends_the_wait(make: Make, events: Callable[[], list[str]]) -> None:
    engine = make("slow")
    await engine.start()
    waits = [asyncio.create_task(engine.wait_ready()) for _ in range(2)]
    await until(lambda: "loading" in events())
    process_of(engine).kill()
    for outcome in await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), HANG_SECONDS):
        assert isinstance(outcome, EngineDeadError)
        assert "SIGKILL" in str(outcome)


async def test_an_exception_in_a_step_is_the_reason(engine: AsyncEngine) -> None:
    other = asyncio.create_task(collect(engine, request("other", max_tokens=ENDLESS)))
    await until(lambda: engine.in_flight == 1)
    process = process_of(engine)
    with pytest.raises(EngineDeadError, match=r"^RuntimeError: the script says so$"):
        await collect(engine, request(first=FAIL))
    with pytest.raises(EngineDeadError, match="the script says so"):
        await other
    assert engine.state == "dead"
    await until(lambda: gone(process))


async def test_an_exit_without_a_word_is_told_by_its_code(engine: AsyncEngine) -> None:
    with pytest.raises(EngineDeadError, match="exit code 7"):
        await asyncio.wait_for(collect(engine, request(first=EXIT)), HANG_SECONDS)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
async def test_a_signal_to_stop_is_the_servers_to_act_on(engine: AsyncEngine, sent: signal.Signals) -> None:
    process_of(engine).send_signal(sent)
    assert tokens(await collect(engine, request(max_tokens=50))) == list(range(50))


PARENT = """
import asyncio, sys, tempfile
from pilotfish.engine.process.client import AsyncEngine
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.request import Request
from pilotfish.engine.params import SamplingParams

async def main(state, folder, *command):
    tempfile.tempdir = folder
    engine = AsyncEngine(EngineConfig(model="slow" if state == "loading" else "fake"), command=command)
    await engine.start()
    if state != "loading":
        await engine.wait_ready()
    if state == "busy":
        deltas = engine.generate(Request(id="r", prompt_ids=(0,), params=SamplingParams(max_tokens=10**6)))
        await anext(deltas)
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(params=["loading", "idle", "busy"])
def parent(request: pytest.FixtureRequest, tmp_path: Path, sockets: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has an engine in that state, and says the engine's process id."""
    fake = [sys.executable, str(FAKE_ENGINE), str(tmp_path / "events")]
    command = [sys.executable, "-c", PARENT, request.param, str(sockets), *fake]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


async def test_the_engine_ends_with_its_parent(
    parent: subprocess.Popen[str], events: Callable[[], list[str]], folders: Callable[[], list[Path]]
) -> None:
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    await until(lambda: "loading" in events())
    assert folders()
    parent.kill()
    await until(lambda: gone(child))
    assert not folders()


# Stopping


async def test_stop_aborts_what_runs_and_leaves_nothing(engine: AsyncEngine, folders: Callable[[], list[Path]]) -> None:
    folder = folders()[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    tasks = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=ENDLESS))) for i in range(20)]
    await until(lambda: engine.in_flight == 20)
    process = process_of(engine)
    stops = [asyncio.create_task(engine.stop()) for _ in range(2)]
    await asyncio.sleep(0)  # not longer: it may have stopped a moment later
    with pytest.raises(EngineNotReadyError, match="stopping"):
        engine.generate(request())
    for deltas in await asyncio.gather(*tasks):
        assert deltas[-1].finish_reason == "abort"
        assert deltas[-1].stats is not None
    await asyncio.gather(*stops)
    await engine.stop()
    assert (engine.state, engine.in_flight, engine.pid) == ("dead", 0, None)
    assert gone(process)
    assert not folders()
    with pytest.raises(EngineDeadError, match="stopped"):
        engine.generate(request())


async def test_stop_while_it_loads(
    make: Make, folders: Callable[[], list[Path]], events: Callable[[], list[str]]
) -> None:
    engine = make("slow")
    await engine.start()
    wait = asyncio.create_task(engine.wait_ready())
    await until(lambda: "loading" in events())
    await asyncio.wait_for(engine.stop(), HANG_SECONDS / 2)  # loading would take that long
    with pytest.raises(EngineDeadError, match="stopped"):
        await wait
    assert not folders()


async def test_stop_of_a_process_that_does_not_listen(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.engine.process.client.STOP_SECONDS", 0.2)
    task = asyncio.create_task(collect(engine, request(max_tokens=ENDLESS)))
    await until(lambda: engine.in_flight == 1)
    process_of(engine).suspend()  # neither Shutdown nor the end of its standard input reaches it
    await asyncio.wait_for(engine.stop(), HANG_SECONDS)
    with pytest.raises(EngineDeadError, match="stopped"):
        await task
    assert engine.pid is None


async def test_a_kill_does_not_wait_for_a_step(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.engine.process.client.STOP_SECONDS", 1e9)
    task = asyncio.create_task(collect(engine, request(max_tokens=ENDLESS)))
    await until(lambda: engine.in_flight == 1)
    process = process_of(engine)
    process.suspend()
    engine.kill()
    await asyncio.wait_for(engine.stop(), HANG_SECONDS)
    with pytest.raises(EngineDeadError, match="stopped"):
        await task
    assert gone(process)


async def test_stop_before_start(make: Make) -> None:
    engine = make()
    await engine.stop()
    with pytest.raises(EngineDeadError, match="stopped"):
        await engine.wait_ready()


# With a real core


async def test_a_real_engine_says_what_the_engine_in_this_process_says(tiny_llama: Path, sockets: Path) -> None:
    from pilotfish.engine.llm import LLM

    steps: list[StepStats] = []
    config = EngineConfig(model=str(tiny_llama), kv_cache_memory=4 << 20, num_threads=1)
    params = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    prompts = [[5 + i] * (20 * i + 1) for i in range(8)]
    each = [msgspec.structs.replace(params, seed=i) for i in range(8)]
    with LLM(config=config) as llm:
        expected = [(one.token_ids, one.logprobs, one.prompt_logprobs) for one in llm.generate(prompts, each)]
        requests = llm.requests(prompts, each)
        info = llm.info
    engine = AsyncEngine(config, on_stats=steps.append)
    await engine.start()
    try:
        said, own = await engine.wait_ready(), {"load_seconds": 0, "memory": ()}
        assert msgspec.structs.replace(said, **own) == msgspec.structs.replace(info, **own)
        endless = msgspec.structs.replace(params, max_tokens=1900)
        left = engine.generate(Request(id="left", prompt_ids=(1, 2, 3), params=endless))
        await anext(left)
        answers = await asyncio.gather(*(collect(engine, one) for one in requests))
        await left.aclose()
        await until(lambda: engine.in_flight == 0)
    finally:
        await engine.stop()
    got = []
    for deltas in answers:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        got.append((tokens(deltas), logprobs, list(deltas[0].prompt_logprobs or ())))
    assert got == expected
    assert max(step.running for step in steps) == 9
    assert (steps[-1].running, steps[-1].blocks_used) == (0, 0)


async def test_a_real_engine_names_the_model_that_it_does_not_find(sockets: Path) -> None:
    engine = AsyncEngine(EngineConfig(model="./no-such-folder"))
    await engine.start()
    with pytest.raises(EngineDeadError, match="no-such-folder"):
        await engine.wait_ready()
    await engine.stop()
