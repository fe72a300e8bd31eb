"""The controller in simulated worlds: true costs and acceptances that it does not know, a clock that is a sum."""

import random
from collections.abc import Callable

import pytest

from engine.build import CALIBRATED
from engine.memory.block_pool import BlockPool
from engine.memory.block_table import BlockTable
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from engine.speculation.controller import Controller
from engine.speculation.cost import DraftCost, RowCost
from engine.speculation.drafter import Draft

LONGEST = 8
Cost = Callable[[int], float]


def memory_bound(rows: int) -> float:
    """A GPU-like target: up to some rows all cost the same, then each costs."""
    return 20e-3 + max(0, rows - 12) * 1.5e-3


def compute_bound(rows: int) -> float:
    return 5e-3 + 2e-3 * rows


def make_sequences(count: int) -> list[Sequence]:
    pool = BlockPool(1, 16)
    params = SamplingParams()
    return [Sequence(Request(id=str(i), prompt_ids=(1,), params=params), 0, BlockTable(pool)) for i in range(count)]


class World:
    """Sequences whose drafts are right with a probability by sequence, step and position; steps that take `cost`."""

    def __init__(self, cost: Cost, right: Callable[[int, int, int], float], draft_cost: Cost | None = None) -> None:
        self.cost, self.right, self.draft_cost = cost, right, draft_cost
        self.controller = Controller()
        self.random = random.Random(0)
        self.step_number = 0
        # The better of two, as the engine does at start
        measured = {rows: min(self.noisy(cost(rows)) for _ in range(2)) for rows in CALIBRATED}
        self.controller.target.calibrate(measured)

    def noisy(self, seconds: float) -> float:
        return seconds * self.random.uniform(0.9, 1.1) * (3.0 if self.random.random() < 0.01 else 1.0)

    def step(self, sequences: list[Sequence], fixed: int | None = None) -> tuple[int, float]:
        """Tokens and seconds of a step: with the controller's lengths or, to compare, one fixed length."""
        length, drafting = LONGEST if fixed is None else fixed, 0.0
        if self.draft_cost is not None and fixed is None:
            length = self.controller.limit("d", sequences, LONGEST, len(sequences))
        if self.draft_cost is not None and length:
            drafting = self.noisy(self.draft_cost(length))
        drafts, followed = {}, {}
        for i, sequence in enumerate(sequences):
            outcomes = [self.random.random() < self.right(i, self.step_number, j) for j in range(LONGEST)]
            followed[sequence] = [1 if outcome else 0 for outcome in outcomes]  # 1 is what drafts say
            if length:
                drafts[sequence] = Draft((1,) * length, drafter="d")
        chosen = drafts if fixed is not None else self.controller.choose(drafts, len(sequences), len(sequences))
        rows = len(sequences) + sum(len(draft.tokens) for draft in chosen.values())
        seconds = self.noisy(self.cost(rows))
        tokens = 0
        for sequence in sequences:
            verified = len(chosen[sequence].tokens) if sequence in chosen else 0
            accepted = next((j for j in range(verified) if not followed[sequence][j]), verified)
            tokens += accepted + 1
            if fixed is None and sequence in drafts:
                self.controller.observe_tokens(sequence, drafts[sequence], followed[sequence][: accepted + 1])
        if fixed is None:
            self.controller.observe_step(rows, seconds)
            if drafting:
                self.controller.observe_drafting("d", length, drafting)
        self.step_number += 1
        return tokens, seconds + drafting

    def goodput(self, count: int, fixed: int | None = None, steps: int = 1500) -> float:
        self.random, self.step_number = random.Random(1), 0
        sequences = make_sequences(count)
        results = [self.step(sequences, fixed) for _ in range(steps)]
        return sum(tokens for tokens, _ in results) / sum(seconds for _, seconds in results)


def constant(probability: float) -> Callable[[int, int, int], float]:
    return lambda sequence, step, position: probability


WORLDS = {
    "always right": (memory_bound, constant(0.97), None),
    "never right": (memory_bound, constant(0.02), None),
    "now and then": (memory_bound, constant(0.5), None),
    "rows cost": (compute_bound, constant(0.5), None),
    "rows cost and never right": (compute_bound, constant(0.05), None),
    "sequences differ": (compute_bound, lambda sequence, step, position: (0.9, 0.1)[sequence % 2], None),
    "changes in mid-text": (memory_bound, lambda sequence, step, position: 0.9 if step % 600 < 300 else 0.05, None),
    "a good draft model": (lambda rows: 0.167, constant(0.85), lambda length: 0.01 * length),
    "a draft model that costs": (lambda rows: 0.167, constant(0.25), lambda length: 0.12 * length),
}


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("name", WORLDS)
def test_never_below_plain_and_near_the_best_length(name: str, count: int) -> None:
    cost, right, draft_cost = WORLDS[name]
    fixed = {length: World(cost, right, draft_cost).goodput(count, length) for length in (0, 1, 2, 4, 8)}
    got = World(cost, right, draft_cost).goodput(count)
    assert got >= 0.97 * fixed[0]
    assert got >= 0.93 * max(fixed.values())
    if max(fixed.values()) > 1.3 * fixed[0]:
        assert got > 1.2 * fixed[0]


def test_load_that_rises_and_falls() -> None:
    """What pays at one stream does not at sixteen; what it does at sixteen must not spoil it for one."""
    world = World(compute_bound, constant(0.55))
    for count in (1, 16, 1, 16, 1):
        plain = World(compute_bound, constant(0.55)).goodput(count, 0)
        best = max(World(compute_bound, constant(0.55)).goodput(count, length) for length in (0, 1, 2, 4, 8))
        got = world.goodput(count, steps=600)
        assert got >= 0.97 * plain
        assert got >= 0.93 * best


def test_trials_of_a_drafter_that_does_not_pay_get_rarer() -> None:
    world = World(lambda rows: 0.1, constant(0.0), lambda length: 0.05 * length)
    sequences = make_sequences(1)
    tried = []
    for step in range(4000):
        before = world.controller.acceptance._own["0", "d", 0].expected
        _, _ = world.step(sequences)
        if world.controller.acceptance._own["0", "d", 0].expected != before:
            tried.append(step)
    late = [step for step in tried if step >= 2000]
    assert 1 <= len(late) <= 4
    assert len(tried) < 60


def test_one_request_may_draft_where_another_does_not() -> None:
    world = World(compute_bound, lambda sequence, step, position: (0.95, 0.02)[sequence])
    sequences = make_sequences(2)
    for _ in range(200):
        world.step(sequences)
    drafts = {sequence: Draft((1,) * LONGEST, drafter="d") for sequence in sequences}
    chosen = world.controller.choose(drafts, 2, 2)
    assert len(chosen[sequences[0]].tokens) >= 4
    assert sequences[1] not in chosen


def test_the_same_measurements_give_the_same_choices() -> None:
    assert World(*WORLDS["sequences differ"]).goodput(4) == World(*WORLDS["sequences differ"]).goodput(4)


def test_rows_cost_is_monotone_and_follows_the_machine() -> None:
    cost = RowCost()
    assert cost.predict(5) == 0.0
    cost.calibrate({1: 0.02, 4: 0.02, 8: 0.019, 16: 0.04, 32: 0.07})
    predicted = [cost.predict(rows) for rows in range(1, 80)]
    assert predicted == sorted(predicted)
    assert cost.predict(24) == pytest.approx(0.055)
    assert cost.predict(64) == pytest.approx(0.13)
    for _ in range(300):
        cost.observe(8, 0.038)  # the machine is half as fast now
    assert cost.predict(8) == pytest.approx(0.038, rel=0.02)
    assert 0.045 < cost.predict(16) < 0.09  # and so for what was not measured since
    before = cost.predict(8)
    cost.observe(8, 10.0)
    assert cost.predict(8) < 1.3 * before


def test_draft_cost_is_a_line() -> None:
    cost = DraftCost()
    for _ in range(20):
        for length in (1, 2, 4, 8):
            cost.observe(length, 0.01 + 0.002 * length)
    assert cost.predict(3) == pytest.approx(0.016, rel=0.02)
    assert cost.predict(8) == pytest.approx(0.026, rel=0.02)
