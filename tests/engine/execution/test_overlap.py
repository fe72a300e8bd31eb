"""A step in two halves, for devices that compute by themselves once a pass is launched. Here such a device is made of
the CPU: a launched pass is computed when somebody waits for it, and until then its results are not there."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from pilotfish.engine.core import FinishedStep
from pilotfish.engine.execution.batch import Span, pack
from pilotfish.engine.llm import LLM
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process import main as process
from pilotfish.engine.process.messages import Abort, FromEngine, Outputs, Shutdown, Submit, ToEngine
from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats
from tests.support.texts import GREEDY, PARAMS, portfolio, prompts, stats_of, texts


class Device:
    """Computes a pass when it is waited for. Stands in for a core's runner; `Waits` in front of whoever reads."""

    def __init__(self, core: Any) -> None:
        engine = core.engine
        self._runner = engine.runner
        self._pending: Callable[[], object] | None = None
        core.engine = dataclasses.replace(engine, runner=self, verifier=Waits(self, engine.verifier))
        new_timer = core._new_timer
        core._new_timer = lambda: Waits(self, new_timer())
        core.asynchronous = True

    draws = False
    how = "no_graphs"

    def run(self, spans: list[Span], tap: FeatureTap | None = None) -> torch.Tensor:
        assert self._pending is None, "two passes at once"
        host = pack(spans, self._runner.block_size)
        logits = torch.full((host.shape.wanted, self._runner.model.config.vocab_size), torch.nan)
        self._pending = lambda: logits.copy_(self._runner.run_batch(host, tap))
        return logits

    def arrive(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()


class Waits:
    """`verify` of a verifier, `seconds` of a timer: both are there only once the pass is done."""

    def __init__(self, device: Device, subject: Any) -> None:
        self._device, self._subject = device, subject

    def __getattr__(self, name: str) -> Any:
        if name in ("verify", "seconds"):
            self._device.arrive()
        return getattr(self._subject, name)


@pytest.fixture(scope="module")
def make(tiny: Callable[[str], Path], head: Path) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "drafter": portfolio(tiny("llama"), head),
            "kernels": "native",
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
        }
        return LLM(**{**defaults, **settings})

    return build


def requests_of(llm: LLM) -> list[Request]:
    names = ["greedy", "sampled", "penalties", "stops"]
    params = [PARAMS[names[i % 4]] for i in range(16)]
    drafters = ["auto", "off", "ngram", "eagle3", "draft-model"]
    return llm.requests(prompts(8) * 2, params, speculation=[drafters[i % 5] for i in range(16)])


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_text_and_every_request_ends_once(seed: int, adaptive: bool, make: Callable[..., LLM]) -> None:
    """Requests come and go at any time: before a launch, during a pass, before and after a step's account."""
    per_block = 2 * 5 * 16 * 2 * 16 * 4
    settings = {"adaptive_drafts": adaptive, "max_batch_tokens": 48}
    plain = make(**settings)
    wanted: dict[str, list[int]] = {}
    for request in requests_of(plain):
        tokens = wanted[request.id] = []
        for delta in plain.stream([request]):
            tokens += delta.token_ids

    llm = make(**settings, kv_cache_memory=20 * per_block if seed % 2 else 4 << 20)
    core, generator = llm.core, random.Random(seed)
    device = Device(core)
    waiting = requests_of(llm)
    generator.shuffle(waiting)
    got: dict[str, list[int]] = {}
    ends: dict[str, list[str]] = {}
    aborted: set[str] = set()
    stats: list[StepStats] = []

    def come_and_go() -> None:
        while waiting and generator.random() < 0.3:
            request = waiting.pop()
            core.add(request)
            got[request.id], ends[request.id] = [], []
        if got and generator.random() < 0.05:
            request_id = generator.choice(list(got))
            if not ends[request_id]:
                aborted.add(request_id)
            core.abort(request_id)

    finished: FinishedStep | None = None
    while waiting or core.has_work():
        come_and_go()
        step = core.launch()
        come_and_go()
        if finished is not None:
            stats.append(core.settle(finished))
        come_and_go()
        finished = core.finish(step)
        for delta in finished.deltas:
            assert not ends[delta.request_id], "a delta behind the last one"
            got[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                ends[delta.request_id].append(delta.finish_reason)
    assert finished is not None
    stats.append(core.settle(finished))
    assert device._pending is None
    assert all(len(reasons) == 1 for reasons in ends.values())
    assert len(ends) == 16
    for request_id, tokens in got.items():
        if request_id not in aborted or ends[request_id] != ["abort"]:
            assert tokens == wanted[request_id]
        assert tokens == wanted[request_id][: len(tokens)]
    assert aborted
    assert sum(map(len, got.values())) == sum(step.generated_tokens for step in stats)
    engine = core.engine
    assert engine.pool.used == 0
    drafters: dict[str, Any] = engine.speculator.model_drafters
    assert all(drafter._pool.used == 0 for drafter in drafters.values())


@pytest.mark.parametrize("late", [False, True])
def test_an_answers_blocks_are_found_to_its_last_token(late: bool, make: Callable[..., LLM]) -> None:
    llm = make(adaptive_drafts=False, speculation="ngram")
    if late:
        Device(llm.core)
    # Each last token but one fills a block.
    ends = [msgspec.structs.replace(GREEDY, max_tokens=33 - len(prompt) % 16) for prompt in prompts(8)]
    texts_ = [[*done.prompt_ids, *done.token_ids] for done in llm.generate(prompts(8), ends)]
    again = llm.generate(texts_, GREEDY)
    assert [stats_of(done).cached_prompt_tokens for done in again] == [(len(text) - 1) // 16 * 16 for text in texts_]
    assert texts(again) == texts(llm.generate(texts_, GREEDY, speculation="off"))


class Script:
    """A connection and a core in one, which note what happens; `messages` come one list at a time."""

    info: EngineInfo

    def __init__(self, asynchronous: bool, messages: list[list[ToEngine]], steps: int) -> None:
        self.asynchronous = asynchronous
        self.happened: list[str] = []
        self._messages, self._steps = messages, steps

    def receive(self, wait: bool) -> list[ToEngine]:
        self.happened.append("wait" if wait else "look")
        return self._messages.pop(0) if self._messages else [Shutdown()]

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, Outputs)
        self.happened.append(f"send {message.deltas[0].request_id}")

    def add(self, request: Request) -> None:
        self.happened.append(f"add {request.id}")

    def abort(self, request_id: str) -> None:
        self.happened.append(f"abort {request_id}")
        self._steps = min(self._steps, 1)

    def has_work(self) -> bool:
        return "add a" in self.happened and self._steps > 0

    def launch(self) -> None:
        self.happened.append("launch")

    def finish(self, step: None) -> SimpleNamespace:
        self._steps -= 1
        self.happened.append("finish")
        return SimpleNamespace(deltas=[Delta(request_id=str(self._steps))])

    def settle(self, step: SimpleNamespace) -> StepStats:
        self.happened.append("settle")
        return StepStats(
            running=1,
            waiting=0,
            rows=1,
            prompt_tokens=0,
            generated_tokens=1,
            blocks_total=1,
            blocks_used=1,
            blocks_cached=0,
        )


def submit(name: str) -> Submit:
    return Submit(Request(id=name, prompt_ids=(1,), params=SamplingParams()))


def test_while_a_pass_runs_the_last_outputs_leave_and_messages_come_in() -> None:
    script: Any = Script(True, [[submit("a")], [submit("b")], [], [Abort(("b",))], [Shutdown()]], steps=3)
    process._serve(script, script)
    assert script.happened[:-2] == [
        *("wait", "add a", "launch", "look", "add b", "finish"),  # nothing to send yet
        *("look", "launch", "settle", "send 2", "look", "abort b", "finish", "settle", "send 0"),  # nothing to wait for
        "wait",
    ]
    assert sorted(script.happened[-2:]) == ["abort a", "abort b"]


def test_on_the_cpu_outputs_leave_at_once() -> None:
    script: Any = Script(False, [[submit("a")], [submit("b")], [Shutdown()]], steps=2)
    process._serve(script, script)
    assert " ".join(script.happened).startswith(
        "wait add a launch finish settle send 1 look add b launch finish settle send 0 wait"
    )
