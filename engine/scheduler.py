"""The scheduler decides which sequences advance in a step, and by how many tokens. It handles blocks, but neither
tensors nor models.

Continuous batching with chunked prefill: decoding sequences come first and always get their rows; the rest of the
step's token budget goes to prompts, oldest first, in chunks. Beside sequences that decode, chunks are as large as their
predicted time allows (`engine.pace`), so a long prompt costs the others at most that bound a step.
When blocks run out, the youngest running sequence is preempted: it releases all of its blocks and is recomputed later.
The oldest can always go on, so there is no deadlock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from pilotfish.engine.draft import NO_DRAFT, Draft, shortened
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.pace import GRAIN, PrefillPace, pairs_of
from pilotfish.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PlannedSpan:
    """Positions [start, stop) of a sequence, of which those from len(sequence.tokens) on are the draft's."""

    sequence: Sequence
    start: int
    stop: int
    draws: bool
    """Whether it reaches the last known token, so that its last rows draw tokens."""
    draft: Draft = NO_DRAFT

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def prompt_rows(self) -> int:
        """Number of its rows that are prompt tokens."""
        prompt_len = self.sequence.prompt_len
        return min(self.stop, prompt_len) - self.start if self.start < prompt_len else 0

    @property
    def decodes(self) -> bool:
        """Whether it was decoding before this step. The last chunk of a prompt draws a token without decoding, and so
        does the recomputation of a preempted sequence."""
        return self.start >= self.sequence.prompt_len and self.stop - self.start == len(self.draft.tokens) + 1

    @property
    def logit_rows(self) -> int:
        """Number of rows whose logits are needed: those that draw, or all of them for prompt logprobs."""
        if self.sequence.wants_prompt_logprobs:
            return self.rows
        return len(self.draft.tokens) + 1 if self.draws else 0


@dataclass(slots=True)
class StepPlan:
    spans: list[PlannedSpan] = field(default_factory=list)
    preemptions: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    prompts: bool = False
    """Whether a sequence reads its prompt, or is recomputed."""

    @property
    def rows(self) -> int:
        return sum([span.stop - span.start for span in self.spans])

    @property
    def pairs(self) -> int:
        """Number of keys that its rows see, in all."""
        return sum([pairs_of(span.start, span.stop - span.start) for span in self.spans])


@dataclass(slots=True)
class _Room:
    """What a step has left for prompts."""

    rows: int
    seconds: float


class Scheduler:
    """Plans steps of at most `max_batch_tokens` rows, over at most `max_num_seqs` running sequences; `pace` bounds the
    chunks of prompts beside those that decode."""

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_batch_tokens: int, pace: PrefillPace | None = None
    ) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._pace = pace or PrefillPace()
        # Both are oldest first. Admission is in order, so waiting sequences are younger than running ones.
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.blocks.release()

    def decoding(self) -> list[Sequence]:
        """Return the sequences that draw a token in the next step, and may be drafted for."""
        return [sequence for sequence in self.running if sequence.decoding]

    def prompt_rows(self) -> int:
        """Estimate the rows that the next step has for prompts, before it is planned."""
        reading = [sequence for sequence in self.running if not sequence.decoding]
        unread = sum(len(sequence.tokens) - sequence.computed for sequence in reading)
        if len(self.running) < self._max_num_seqs:
            unread += sum(len(sequence.tokens) for sequence in islice(self.waiting, self._max_num_seqs))
        most, decoding = min(unread, self._max_batch_tokens), len(self.running) - len(reading)
        if not most or not decoding:
            return most
        start = reading[0].computed if reading else 0
        return max(self._pace.rows(start, most, self._pace.bound, decoding), min(most, GRAIN))

    def plan(self, drafts: Mapping[Sequence, Draft]) -> StepPlan:
        """Plan the next step's spans and reserve their blocks. Drafts may be shortened or dropped."""
        plan = StepPlan()
        decoding = self.decoding()
        budget = self._max_batch_tokens - len(decoding)
        # Where prompts wait for rows, drafts leave them half of the step.
        prompts = bool(self.waiting) or len(decoding) < len(self.running)
        draft_budget = budget // 2 if prompts else budget
        for sequence in decoding:
            if sequence not in self.running:
                continue  # preempted for an older one
            draft = shortened(drafts.get(sequence, NO_DRAFT), draft_budget)
            if (reserved := self._reserve(sequence, draft, plan)) is not None:
                draft_budget -= len(reserved.tokens)
                budget -= len(reserved.tokens)
                stop = len(sequence.tokens) + len(reserved.tokens)
                plan.spans.append(PlannedSpan(sequence, sequence.computed, stop, draws=True, draft=reserved))
        room = _Room(budget, self._pace.bound if plan.spans else math.inf)
        for sequence in self.running:
            if not sequence.decoding:
                self._chunk(sequence, room, plan)
        if not plan.preemptions:
            self._admit(room, plan)
        return plan

    def _reserve(self, sequence: Sequence, draft: Draft, plan: StepPlan) -> Draft | None:
        """Reserve blocks for the sequence's next rows. Returns the draft, or no draft if there is no room for it; None
        if the sequence was itself preempted."""
        while not sequence.blocks.reserve(len(sequence.tokens) + len(draft.tokens)):
            if draft.tokens:
                draft = NO_DRAFT  # a draft is a guess: no sequence is preempted for it
                continue
            youngest = self.running.pop()
            youngest.blocks.release()
            youngest.computed = 0
            youngest.preemptions += 1
            plan.preemptions += 1
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return None
        return draft

    def _chunk(self, sequence: Sequence, room: _Room, plan: StepPlan) -> None:
        """Plan the next piece of a sequence's prompt, if there is room for any."""
        start, most = sequence.computed, min(len(sequence.tokens) - sequence.computed, room.rows)
        rows = self._pace.rows(start, most, room.seconds, plan.rows) if most > 0 else 0
        if not plan.prompts:  # however slow the machine is, some prompt gets on
            rows = max(rows, min(most, GRAIN))
        if rows <= 0:
            room.rows = 0  # an older prompt is not overtaken
            return
        plan.spans.append(PlannedSpan(sequence, start, start + rows, draws=start + rows == len(sequence.tokens)))
        plan.prompts = True
        room.rows -= rows
        if not math.isinf(room.seconds):
            room.seconds -= self._pace.seconds(start, rows)

    def _admit(self, room: _Room, plan: StepPlan) -> None:
        while self.waiting and room.rows > 0 and room.seconds > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if sequence.params.prompt_logprobs is None:  # these need every prompt position's logits
                sequence.computed = sequence.blocks.claim_prefix(sequence.tokens)
            # Reserve the whole prompt, and leave a block for each running sequence, so that an older sequence's next
            # token does not preempt the one just admitted.
            if not sequence.blocks.reserve(len(sequence.tokens)) or self._pool.available < len(self.running):
                sequence.blocks.release()
                sequence.computed = 0
                return
            self.waiting.popleft()
            self.running.append(sequence)
            plan.admitted.append(sequence)
            self._chunk(sequence, room, plan)
