"""The pace of prefill: what it predicts, and the chunks that follow from it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.llm import LLM
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.pace import GRAIN, PrefillPace, pairs_of
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.scheduler import Scheduler
from pilotfish.engine.sequence import Sequence

STREAM, PROMPT = 20, 6000


class Machine:
    """Runs a scheduler's steps on a clock of its own: base + row * rows + pair * pairs seconds, with noise."""

    def __init__(self, bound: float, base: float, row: float, pair: float, streams: int, noise: float = 0.05) -> None:
        self.costs, self.noise = (base, row, pair), noise
        self.pace = PrefillPace(bound, 1e-4)
        self.pool = BlockPool(20_000, 16, prefix_caching=False)
        self.scheduler = Scheduler(self.pool, 64, 512, self.pace)
        self.dice = random.Random(1)
        self.count = 0
        for _ in range(streams):
            self.add(STREAM, 100_000)

    def add(self, prompt: int, answer: int) -> Sequence:
        params = SamplingParams(max_tokens=answer)
        request = Request(id=str(self.count), prompt_ids=(1,) * prompt, params=params)
        sequence = Sequence(request, 0, BlockTable(self.pool))
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[float, int]:
        """Run a step; return the true seconds that prompts add to it, and its rows of prompts."""
        plan = self.scheduler.plan({})
        base, row, pair = self.costs
        pairs = plan.pairs
        seconds = base + row * plan.rows + pair * pairs
        reading = [span for span in plan.spans if not span.decodes]
        assert plan.prompts == bool(reading)
        added = sum(row * span.rows + pair * pairs_of(span.start, span.rows) for span in reading)
        noisy = seconds * math.exp(self.dice.gauss(0, self.noise))
        self.pace.observe(plan.rows, pairs, plan.prompts, noisy)
        for span in plan.spans:
            sequence = span.sequence
            if span.draws:
                sequence.tokens.append(1)
            sequence.computed = len(sequence.tokens) - 1 if span.draws else span.stop
        return added, sum(span.rows for span in reading)


@pytest.mark.parametrize("speed", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("streams", [1, 8, 24])
def test_those_who_decode_wait_no_longer_than_the_bound(streams: int, speed: float) -> None:
    """On slow and fast machines: never much longer, and as long as there is more to read, not much shorter either."""
    machine = Machine(0.08 * speed, 0.025 * speed, 0.002 * speed, 0.9e-6 * speed, streams)
    for _ in range(40):
        machine.step()
    long = machine.add(PROMPT, 5)
    added = []
    while not long.decoding:
        added.append(machine.step()[0] / speed)
    settled = sorted(added[5:-1])
    assert max(settled) < 0.12
    assert settled[len(settled) // 20] > 0.03
    assert max(added) < 0.2


def test_prompts_share_the_bound() -> None:
    """Twenty prompts that would each fit: several are read in a step, no more than fit together."""
    machine = Machine(0.08, 0.006, 0.0004, 0.9e-7, streams=4)
    for _ in range(10):
        machine.step()
    for _ in range(20):
        machine.add(100, 1)
    added, rows = machine.step()
    assert added < 0.12
    assert rows > 100


def test_where_nobody_decodes_chunks_are_large() -> None:
    machine = Machine(0.001, 0.025, 0.002, 0.9e-6, streams=0)
    machine.add(PROMPT, 5)
    assert machine.step()[1] == 512
    assert machine.step()[1] == 512


def test_prompts_get_on_however_slow_the_machine_is() -> None:
    machine = Machine(0.001, 0.025, 0.002, 0.9e-6, streams=4)
    for _ in range(5):
        machine.step()
    machine.add(PROMPT, 5)
    machine.add(PROMPT, 5)
    assert {machine.step()[1] for _ in range(20)} == {GRAIN}


def test_a_change_of_speed_is_followed() -> None:
    """A neighbour that takes three quarters of the machine: chunks fit again after a few of them."""
    machine = Machine(0.08, 0.006, 0.0004, 0.9e-7, streams=4)
    for _ in range(10):
        machine.step()
    machine.add(5 * PROMPT, 5)
    for _ in range(20):
        machine.step()
    machine.costs = (0.024, 0.0016, 3.6e-7)
    slow = [machine.step()[0] for _ in range(40)]
    assert max(slow[:3]) > 0.15
    assert max(slow[8:]) < 0.12


def test_large_steps_have_the_sizes_that_a_gpu_captures() -> None:
    machine = Machine(0.08, 0.006, 0.0002, 1e-9, streams=7, noise=0.0)
    for _ in range(10):
        machine.step()
    machine.add(PROMPT, 5)
    machine.step()
    for _ in range(5):
        assert 7 + machine.step()[1] in (128, 256, 512)


@settings(max_examples=300)
@given(
    st.integers(0, 200_000), st.integers(1, 8192), st.floats(1e-4, 10), st.integers(0, 300), st.floats(1e-6, 1e-2),
    st.floats(1e-12, 1e-5),
)  # fmt: skip
def test_rows_take_at_most_their_seconds(
    start: int, most: int, seconds: float, beside: int, row: float, pair: float
) -> None:
    pace = PrefillPace(seconds, pair / row)
    for rows in (1, 16, 100, 512):
        pace.observe(rows, pairs_of(start, rows), True, 0.01 + row * rows + pair * pairs_of(start, rows))
    rows = pace.rows(start, most, seconds, beside)
    assert 0 <= rows <= most
    assert pace.seconds(start, rows) <= seconds * (1 + 1e-6)
    if 0 < rows < most:
        assert (rows + beside) % GRAIN == 0


def test_no_bound_takes_all() -> None:
    pace = PrefillPace(0.0)
    pace.observe(10, 100, True, 5.0)
    assert pace.rows(1000, 700, pace.bound, 3) == 700


def test_the_engine_paces_prompts_by_its_own_steps(tiny: Callable[[str], Path]) -> None:
    """Beside a stream, with a bound that nothing keeps, a prompt is read 16 rows at a time; without one, at once."""
    model = tiny("llama")
    for bound, expected in ((0.001, [16, 16, 16, 16, 15]), (0.0, [79])):
        rows: list[int] = []
        with LLM(str(model), speculation="none", max_prefill_ms=bound, prefix_caching=False) as llm:
            core = llm.core
            params = SamplingParams(max_tokens=60, ignore_eos=True)
            core.add(Request(id="stream", prompt_ids=(5, 6, 7), params=params))
            for _ in range(3):
                core.step()
            core.add(Request(id="prompt", prompt_ids=tuple(range(5, 85))[:79], params=params))
            done = False
            while not done:
                result = core.step()
                rows.append(result.stats.prompt_tokens)
                done = any(delta.request_id == "prompt" for delta in result.deltas)
        assert rows == expected
