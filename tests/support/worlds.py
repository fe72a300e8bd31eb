"""Simulated worlds for the controller: true costs and acceptances that it does not know, a clock that is a sum.

The target always says 1. A drafter says 1 with a probability by sequence, step and position, else 0, which is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilotfish.engine.draft import Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence as Decoding
from pilotfish.engine.speculation.control.calibration import CALIBRATED
from pilotfish.engine.speculation.control.candidates import Candidate, Choice, UpcomingStep
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.control.cost import RowCost

LONGEST = 8
LENGTHS = (1, 2, 4, 8)

Cost = Callable[[int], float]
"""Seconds of a pass over so many rows."""
Right = Callable[[int, int, int], float]
"""Probability that a token is right, those before it being so, by sequence, step and position."""


def memory_bound(rows: int) -> float:
    """A GPU-like target: up to some rows all cost the same, then each costs."""
    return 20e-3 + max(0, rows - 12) * 1.5e-3


def compute_bound(rows: int) -> float:
    return 5e-3 + 2e-3 * rows


def small_cpu(rows: int) -> float:
    """What was measured on two cores: 9 rows cost 1.2 times a single one, 72 rows 4.8 times 8 rows."""
    return 18e-3 + 0.5e-3 * (rows - 1) + max(0, rows - 8) * 1.3e-3


def constant(probability: float) -> Right:
    return lambda sequence, step, position: probability


@dataclass(frozen=True)
class Simulated:
    """A drafter. `cost`: of its passes by rows, None for lookup; `prompt`: rows to read before a first draft."""

    name: str
    right: Right
    cost: Cost | None = None
    prompt: int = 1
    prior: float = 0.5
    confident: bool = False
    """It says how likely each of its tokens is, and is right about it."""
    block: int = 0
    """Rows of the one pass that drafts all tokens of a sequence; 0: each pass drafts one of them."""
    measured: float = 1.0
    """What its passes are taken to cost at the start, as a multiple of what they do."""


Fixed = tuple[str, int]
"""A drafter and a length, for all sequences and steps."""


class World:
    def __init__(self, cost: Cost, drafters: Sequence[Simulated], turnover: int = 0) -> None:
        """`turnover`: tokens after which a sequence ends and another takes its place; 0: never."""
        self.cost, self.turnover = cost, turnover
        self.drafters = {drafter.name: drafter for drafter in drafters}
        self.controller = Controller(LONGEST, {drafter.name: drafter.prior for drafter in drafters})
        self.random = random.Random(0)
        self.controller.target.calibrate(self._calibrated(cost))
        for drafter in drafters:
            if drafter.cost is not None:
                self.controller.drafting[drafter.name] = RowCost(drafter.block)
                self.controller.drafting[drafter.name].calibrate(
                    {rows: drafter.measured * seconds for rows, seconds in self._calibrated(drafter.cost).items()}
                )
        self.asked: list[tuple[int, str]] = []
        """Steps in which a model-based drafter was asked, and its name."""
        self.step_number = self.made = 0
        self._unread: dict[tuple[str, str], int] = {}
        self._tokens: dict[str, int] = {}

    def _calibrated(self, cost: Cost) -> dict[int, float]:
        """The better of two, as the engine does at start."""
        return {rows: min(self.noisy(cost(rows)) for _ in range(2)) for rows in CALIBRATED}

    def noisy(self, seconds: float) -> float:
        return seconds * self.random.uniform(0.9, 1.1) * (3.0 if self.random.random() < 0.01 else 1.0)

    def sequence(self, drafters: tuple[str, ...] | None = None) -> Decoding:
        self.made += 1
        request = Request(id=str(self.made), prompt_ids=(1,), params=SamplingParams(max_tokens=10**6))
        wanted = tuple(self.drafters) if drafters is None else drafters
        return Decoding(request, 0, BlockTable(BlockPool(1, 16)), wanted)

    def draft(self, drafter: Simulated, place: int, length: int) -> Draft:
        chances = [drafter.right(place, self.step_number, position) for position in range(length)]
        tokens = tuple(int(self.random.random() < chance) for chance in chances)
        return Draft(tokens, drafter=drafter.name, confidences=tuple(chances) if drafter.confident else ())

    def step(self, sequences: list[Decoding], fixed: Fixed | None = None) -> tuple[dict[Decoding, int], float]:
        """Tokens of each sequence and seconds of a step, as the controller has it or, to compare, as is fixed."""
        count, drafting = len(sequences), 0.0
        candidates = {}
        for place, sequence in enumerate(sequences):
            candidate = candidates[sequence] = Candidate(sequence, LONGEST)
            for name in sequence.drafters:
                drafter = self.drafters[name]
                if drafter.cost is None:
                    candidate.drafts.append(self.draft(drafter, place, LONGEST))
                else:
                    candidate.backlog[name] = (
                        self._unread.setdefault((sequence.id, name), drafter.prompt) + drafter.block
                    )
        step = UpcomingStep(count, count, list(candidates.values()))
        if fixed is None:
            asks = {
                name: {request.sequence: request.limit for request in requests}
                for name, requests in self.controller.ask(step).items()
            }
        else:
            wanted = fixed[1] and self.drafters[fixed[0]].cost is not None
            asks = {fixed[0]: dict.fromkeys(sequences, fixed[1])} if wanted else {}
        for name, limits in asks.items():
            drafter = self.drafters[name]
            assert drafter.cost is not None
            passes = [sum(candidates[sequence].backlog[name] for sequence in limits)]
            if not drafter.block:
                passes += [len(limits)] * (max(limits.values()) - 1)
            took = sum(self.noisy(drafter.cost(rows)) for rows in passes)
            for sequence, limit in limits.items():
                candidates[sequence].drafts.append(self.draft(drafter, sequences.index(sequence), limit))
                self._unread[sequence.id, name] = 0
            drafting += took
            if fixed is None:
                self.controller.observe_drafting(name, passes, took)
                self.asked.append((self.step_number, name))
        choice = self.controller.choose(step) if fixed is None else Choice({})
        if fixed is None:
            chosen = dict(choice.drafts)
        else:
            drafts = {
                s: next((d for d in candidate.drafts if d.drafter == fixed[0]), Draft())
                for s, candidate in candidates.items()
            }
            chosen = {s: Draft(draft.tokens[: fixed[1]]) for s, draft in drafts.items()}
        rows = count + sum(len(draft.tokens) for draft in chosen.values())
        seconds = self.noisy(self.cost(rows))
        committed = {}
        for sequence in sequences:
            tokens = chosen[sequence].tokens if sequence in chosen else ()
            accepted = next((i for i, token in enumerate(tokens) if not token), len(tokens))
            committed[sequence] = accepted + 1
            for name in candidates[sequence].backlog:
                self._unread[sequence.id, name] += accepted + 1
            if fixed is None:
                self.controller.observe_tokens(choice, sequence, [1] * (accepted + 1))
        if fixed is None:
            self.controller.observe_step(rows, seconds)
        self.step_number += 1
        return committed, seconds + drafting

    def goodput(
        self, count: int, fixed: Fixed | None = None, steps: int = 1500, drafters: Sequence[tuple[str, ...]] = ()
    ) -> float:
        """Tokens per second of so many sequences; `drafters` that each of them may have, else all."""
        self.random, self.step_number = random.Random(1), 0
        sequences = [self.sequence(drafters[i] if drafters else None) for i in range(count)]
        tokens, seconds = 0, 0.0
        for _ in range(steps):
            committed, took = self.step(sequences, fixed)
            tokens, seconds = tokens + sum(committed.values()), seconds + took
            for i, sequence in enumerate(sequences):
                done = self._tokens[sequence.id] = self._tokens.get(sequence.id, 0) + committed[sequence]
                if self.turnover and done >= self.turnover:
                    if fixed is None:
                        self.controller.release(sequence)
                    sequences[i] = self.sequence(sequence.drafters)
        return tokens / seconds


def arms(cost: Cost, drafters: Sequence[Simulated], count: int, **more: int) -> dict[Fixed, float]:
    """The goodput of plain decoding, and of each drafter at each of some lengths."""
    fixed = [("", 0), *((drafter.name, length) for drafter in drafters for length in LENGTHS)]
    steps, turnover = more.get("steps", 1500), more.get("turnover", 0)
    return {each: World(cost, drafters, turnover).goodput(count, each, steps) for each in fixed}
