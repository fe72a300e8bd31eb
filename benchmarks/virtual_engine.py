"""The engine of `virtual_clock.py`: real except for the models, which are recordings, and the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from virtual_costs import Clock, Costs
from virtual_record import LONGEST, Recorded

from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.scheduler import Scheduler
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.calibration import CALIBRATED
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.drafters.drafter import Drafter, DraftRequest
from pilotfish.engine.speculation.drafters.feature_backlog import MOST_PENDING
from pilotfish.engine.speculation.drafters.ngram import NgramDrafter
from pilotfish.engine.speculation.drafters.registry import REGISTRY
from pilotfish.engine.speculation.drafters.suffix import SuffixDrafter
from pilotfish.engine.speculation.speculator import Speculator, lengths_of


class RecordedDrafter:
    """A drafter that proposes what a head proposed at the same position of the recording."""

    def __init__(self, name: str, clock: Clock, questions: dict[str, Recorded]) -> None:
        self.name = name
        self.passes: tuple[int, ...] = ()
        self.block = 0
        self._clock, self._questions = clock, questions
        self._read: dict[str, int] = {}

    def backlog(self, sequence: Sequence) -> int:
        return min(MOST_PENDING, len(sequence.tokens) - 1 - self._read.get(sequence.id, 0))

    def try_pass(self, rows: int) -> None:
        self._clock.spend(self._clock.draft(self.name, rows))

    def capture(self, planned: Callable[[], GraphPlan]) -> None:
        pass

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        passes = [sum(self.backlog(request.sequence) for request in requests)]
        drafts = []
        for request in requests:
            sequence = request.sequence
            self._read[sequence.id] = len(sequence.tokens) - 1
            tokens, confidences = self._questions[sequence.id].drafts[self.name][sequence.output_len - 1]
            length, chance = 0, 1.0
            while length < min(request.limit, len(tokens)) and (not length or chance >= request.floor):
                chance *= confidences[length]
                length += 1
            drafts.append(Draft(tuple(tokens[:length]), None, self.name, confidences=tuple(confidences[:length])))
        longest = max(len(draft.tokens) for draft in drafts)
        passes += [sum(len(draft.tokens) > depth for draft in drafts) for depth in range(1, longest)]
        self.passes = tuple(passes)
        for rows in passes:
            self.try_pass(rows)
        return drafts

    def release(self, sequence: Sequence) -> None:
        self._read.pop(sequence.id, None)


@dataclass
class Engine:
    """`EngineCore` with recorded models and a virtual clock."""

    recording: dict[str, Any]
    costs: Costs
    jitter: float = 0.0
    arm: tuple[str, ...] = ()
    questions: dict[str, Recorded] = field(default_factory=dict)
    made: int = 0
    lookups: list[Drafter] = field(default_factory=lambda: [NgramDrafter(4, 1), SuffixDrafter()])

    def __post_init__(self) -> None:
        self.clock = Clock(self.costs, self.jitter)
        self.heads = tuple(self.costs.drafting)
        heads = [RecordedDrafter(name, self.clock, self.questions) for name in self.heads]
        kinds = {kind.name: kind.prior for kind in REGISTRY}
        self.names = (*(drafter.name for drafter in self.lookups), *self.heads)
        known = {name: kinds.get(name, kinds["eagle3"]) for name in self.names}
        self.controller = Controller(LONGEST, known, lengths_of(self.lookups))
        self.controller.target.calibrate(
            {rows: 1e-3 * self.clock.target(rows, rows, 0) for rows in CALIBRATED}, 1e-3 * self.costs.context_token
        )
        for name in self.heads:
            cost = self.controller.drafting[name] = RowCost()
            cost.calibrate({rows: 1e-3 * self.clock.draft(name, rows) for rows in CALIBRATED})
        self.speculator = Speculator(self.lookups, heads, LONGEST, 8192, self.controller, self.clock)
        self.pool = BlockPool(4096, 16, False)
        self.scheduler = Scheduler(self.pool, 64, 512)

    def visit(self, questions: list[Recorded], drafters: tuple[str, ...], concurrency: int) -> Visit:
        """Decode the questions, `concurrency` at a time."""
        waiting, live, visit, start = deque(questions), 0, Visit(), self.clock.now
        while waiting or live:
            while waiting and live < concurrency:
                self._add(waiting.popleft(), drafters)
                live += 1
            live -= self._step(visit)
        visit.seconds = self.clock.now - start
        return visit

    def _add(self, question: Recorded, drafters: tuple[str, ...]) -> None:
        self.made += 1
        params = SamplingParams(temperature=0.0, max_tokens=self.recording["max_tokens"])
        request = Request(id=str(self.made), prompt_ids=question.prompt, params=params)
        self.questions[request.id] = question
        self.scheduler.add(Sequence(request, 0, BlockTable(self.pool), drafters))

    def _step(self, visit: Visit) -> int:
        """Take a step as `EngineCore.step` does; returns the number of sequences that ended."""
        clock, begun = self.clock, self.clock.now
        drafts = self.speculator.draft(self.scheduler.decoding(), self.scheduler.prompt_rows())
        seconds = {"draft": clock.now - begun}
        plan = self.scheduler.plan(drafts.drafts)
        logit_rows = sum(len(planned.draft.tokens) + 1 for planned in plan.spans if planned.draws)
        context = sum(planned.start for planned in plan.spans)
        seconds["forward"] = clock.spend(clock.target(plan.rows, logit_rows, context))
        own = self.costs.step + self.costs.sequence * len(plan.spans)
        seconds["plan"], seconds["sample"] = clock.spend(0.7 * own), clock.spend(0.3 * own)
        ended = committed = 0
        for planned in plan.spans:
            sequence = planned.sequence
            sequence.computed = planned.stop
            if planned.draws:
                rest = self.questions[sequence.id].answer[sequence.output_len :]
                pairs = zip(planned.draft.tokens, rest, strict=False)
                accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(planned.draft.tokens))
                tokens = rest[: accepted + 1]
                visit.count(planned.draft, accepted, len(tokens), sequence.output_len > 0)
                self.speculator.observe_tokens(drafts, sequence, tokens)
                committed += len(tokens)
                sequence.tokens += tokens
                sequence.computed = len(sequence.tokens) - 1
                if len(tokens) == len(rest):
                    ended += 1
                    self.scheduler.remove(sequence)
                    self.speculator.release(sequence)
                    del self.questions[sequence.id]
        self.speculator.observe_step(drafts, plan.rows, seconds, committed)
        visit.drafting += seconds["draft"]
        return ended


@dataclass
class Visit:
    seconds: float = 0.0
    drafting: float = 0.0
    tokens: int = 0
    steps: int = 0
    decoded: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def count(self, draft: Draft, accepted: int, tokens: int, decoding: bool) -> None:
        self.tokens += tokens
        if decoding:
            self.steps += 1
            self.decoded += tokens
        if draft.tokens:
            self.drafted[draft.drafter] = self.drafted.get(draft.drafter, 0) + len(draft.tokens)
            self.accepted[draft.drafter] = self.accepted.get(draft.drafter, 0) + accepted
