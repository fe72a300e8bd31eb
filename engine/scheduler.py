"""The scheduler decides which sequences advance in a step, and by how many tokens. It handles blocks, but neither
tensors nor models.

Continuous batching with chunked prefill: decoding sequences come first and always get their rows; the rest of the
step's token budget goes to prompts, in chunks. Beside sequences that decode, chunks are as large as their predicted
time allows (`engine.pace`), so a long prompt costs the others at most that bound a step.
Who comes first is decided by `engine.shares`. Where more sequences are there than may run, one whose turn it is pauses
the last that runs: that keeps its blocks, waits, and goes on where it was. When blocks run out, those that are paused,
the last first, and then the last that runs are preempted: they release all of their blocks and are recomputed later.
The first that runs can always go on, so there is no deadlock.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from pilotfish.engine.draft import NO_DRAFT, Draft, shortened
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.pace import GRAIN, PrefillPace, pairs_of
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.shares import Shares

ORDER_STEPS = 4
"""Steps after which the order is looked at again, although no sequence has come or gone: tokens count in it."""


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
    pauses: int = 0
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


_place = attrgetter("place")


class Scheduler:
    """Plans steps of at most `max_batch_tokens` rows, over at most `max_num_seqs` running sequences; `pace` bounds the
    chunks of prompts beside those that decode; `shares` says whose turn it is."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_batch_tokens: int,
        pace: PrefillPace | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._pace = pace or PrefillPace()
        self.shares = shares or Shares()
        # Both in order of `place`. Those that wait may come before some that run, until they can take their place.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._paused: set[Sequence] = set()
        """Those of `waiting` that have kept their blocks."""
        self._changed = False
        """Whether a sequence has come or gone since the order was made."""
        self._steps = 0

    def add(self, sequence: Sequence) -> None:
        self.shares.enter(sequence)
        sequence.place += len(self.waiting) + len(self.running)  # behind all others, until the order is made
        insort(self.waiting, sequence, key=_place)
        self._changed = True

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self._paused.discard(sequence)
        self.shares.leave(sequence)
        sequence.blocks.release()
        self._changed = True

    def arrange(self) -> None:
        """Bring all sequences into their order, if it may have changed. `plan` does it, too; what is decided between by
        the order should come after it."""
        if not self._changed and (self._steps < ORDER_STEPS or not self.waiting or not self.shares.differ):
            return
        self._changed, self._steps = False, 0
        self.shares.order(self.running, self.waiting)
        self.running.sort(key=_place)
        self.waiting.sort(key=_place)

    def decoding(self) -> list[Sequence]:
        """Return the sequences that draw a token in the next step, and may be drafted for."""
        return [sequence for sequence in self.running if sequence.decoding]

    def prompt_rows(self) -> int:
        """Estimate the rows that the next step has for prompts, before it is planned."""
        reading = [sequence for sequence in self.running if not sequence.decoding]
        unread = sum(len(sequence.tokens) - sequence.computed for sequence in reading)
        if self.waiting and self._has_turn(self.waiting[0]):
            first = self.waiting[: self._max_num_seqs]
            unread += sum(len(sequence.tokens) - sequence.computed for sequence in first)
        most, decoding = min(unread, self._max_batch_tokens), len(self.running) - len(reading)
        if not most or not decoding:
            return most
        start = reading[0].computed if reading else 0
        return max(self._pace.rows(start, most, self._pace.bound, decoding), min(most, GRAIN))

    def _has_turn(self, sequence: Sequence) -> bool:
        """Whether one that waits may run, though one that comes after it may have to be paused."""
        return len(self.running) < self._max_num_seqs or sequence.place < self.running[-1].place

    def plan(self, drafts: Mapping[Sequence, Draft]) -> StepPlan:
        """Plan the next step's spans and reserve their blocks. Drafts may be shortened or dropped."""
        self.arrange()
        self._steps += 1
        plan = StepPlan()
        decoding = self.decoding()
        budget = self._max_batch_tokens - len(decoding)
        # Where prompts wait for rows, drafts leave them half of the step.
        prompts = bool(self.waiting) or len(decoding) < len(self.running)
        draft_budget = budget // 2 if prompts else budget
        for sequence in decoding:
            if sequence not in self.running:
                continue  # preempted for one that comes before it
            draft = shortened(drafts.get(sequence, NO_DRAFT), draft_budget)
            if (reserved := self._reserve(sequence, draft, plan)) is not None:
                draft_budget -= len(reserved.tokens)
                budget -= len(reserved.tokens)
                stop = len(sequence.tokens) + len(reserved.tokens)
                plan.spans.append(PlannedSpan(sequence, sequence.computed, stop, draws=True, draft=reserved))
        room = _Room(budget, self._pace.bound if plan.spans else math.inf)
        for sequence in list(self.running):
            if not sequence.decoding:
                self._admit(room, plan, before=sequence.place)
                if sequence in self.running:
                    self._chunk(sequence, room, plan)
        self._admit(room, plan)
        for span in plan.spans:
            if span.prompt_rows:
                self.shares.served(span.sequence, span.prompt_rows)
        return plan

    def _reserve(self, sequence: Sequence, draft: Draft, plan: StepPlan) -> Draft | None:
        """Reserve blocks for the sequence's next rows. Returns the draft, or no draft if there is no room for it; None
        if the sequence was itself preempted."""
        while not sequence.blocks.reserve(len(sequence.tokens) + len(draft.tokens)):
            if draft.tokens:
                draft = NO_DRAFT  # a draft is a guess: no sequence is preempted for it
                continue
            if self._release_paused(plan):
                continue
            last = self.running[-1]
            self._preempt(last, plan)
            if last is sequence:
                return None
        return draft

    def _release_paused(self, plan: StepPlan, behind: int = -1) -> bool:
        """Preempt the last of those that are paused behind a place; False if there is none."""
        last = max(self._paused, key=_place, default=None)
        if last is None or last.place <= behind:
            return False
        self._paused.remove(last)
        self._forget(last, plan)
        return True

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        """Preempt a running sequence, and take its rows out of the plan."""
        self.running.remove(sequence)
        _drop_span(sequence, plan)
        self._forget(sequence, plan)
        insort(self.waiting, sequence, key=_place)

    def _forget(self, sequence: Sequence, plan: StepPlan) -> None:
        sequence.blocks.release()
        sequence.computed = 0
        sequence.preemptions += 1
        plan.preemptions += 1

    def _pause(self, sequence: Sequence, plan: StepPlan) -> int:
        """Let a running sequence wait, with its blocks, and take its rows out of the plan. Returns their number."""
        self.running.remove(sequence)
        rows = _drop_span(sequence, plan)
        self._paused.add(sequence)
        plan.pauses += 1
        insort(self.waiting, sequence, key=_place)
        return rows

    def _chunk(self, sequence: Sequence, room: _Room, plan: StepPlan) -> None:
        """Plan the next piece of a sequence's prompt, if there is room for any."""
        start, most = sequence.computed, min(len(sequence.tokens) - sequence.computed, room.rows)
        rows = self._pace.rows(start, most, room.seconds, plan.rows) if most > 0 else 0
        if not plan.prompts:  # however slow the machine is, some prompt gets on
            rows = max(rows, min(most, GRAIN))
        if rows <= 0:
            room.rows = 0  # a prompt that comes first is not overtaken
            return
        plan.spans.append(PlannedSpan(sequence, start, start + rows, draws=start + rows == len(sequence.tokens)))
        plan.prompts = True
        room.rows -= rows
        if not math.isinf(room.seconds):
            room.seconds -= self._pace.seconds(start, rows)

    def _admit(self, room: _Room, plan: StepPlan, before: float = math.inf) -> None:
        """Let those run that wait, as far as there is room, and their places are before one."""
        while self.waiting and self.waiting[0].place < before and self._has_turn(self.waiting[0]):
            sequence = self.waiting[0]
            full = len(self.running) >= self._max_num_seqs
            # Of one that is paused there is a row.
            if room.rows + full <= 0 or room.seconds <= 0 or plan.preemptions or not self._find_blocks(sequence, plan):
                return
            if len(self.running) >= self._max_num_seqs:
                room.rows += self._pause(self.running[-1], plan)
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_place)
            if sequence in self._paused:
                self._paused.remove(sequence)
            else:
                plan.admitted.append(sequence)
            if sequence.decoding and room.rows > 0:
                plan.spans.append(PlannedSpan(sequence, sequence.computed, len(sequence.tokens), draws=True))
                room.rows -= 1
            else:
                self._chunk(sequence, room, plan)

    def _find_blocks(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Reserve blocks for a sequence that waits; False, and nothing changed for it, if there are too few. Those who
        come after it make room: the paused ones, and of the running ones those that have more than their share."""
        resumed = sequence in self._paused
        if not resumed and sequence.params.prompt_logprobs is None:  # these need every prompt position's logits
            sequence.computed = sequence.blocks.claim_prefix(sequence.tokens)
        # Reserve the whole prompt, and leave a block for each running sequence, so that the next token of one that
        # comes before it does not preempt the one just admitted.
        while not sequence.blocks.reserve(len(sequence.tokens)) or self._pool.available < len(self.running):
            if not self._could_find_blocks(sequence):
                if not resumed:
                    sequence.blocks.release()
                    sequence.computed = 0
                return False
            if not self._release_paused(plan, behind=sequence.place):
                self._preempt(self.running[-1], plan)
        return True

    def _could_find_blocks(self, sequence: Sequence) -> bool:
        """Whether a sequence would find enough blocks if all made room that have to."""
        missing = -(-len(sequence.tokens) // self._pool.block_size) - len(sequence.blocks.blocks)
        found = self._pool.available
        found += sum(len(paused.blocks.blocks) for paused in self._paused if paused.place > sequence.place)
        needed = max(0, missing) + len(self.running)
        for last in reversed(self.running):
            if found >= needed or last.place < sequence.place or not self.shares.may_displace(sequence, last):
                break
            found += len(last.blocks.blocks)
            needed -= 1
        displaceable = bool(self.running) and self.running[-1].place > sequence.place
        displaceable = displaceable and self.shares.may_displace(sequence, self.running[-1])
        paused = any(paused.place > sequence.place for paused in self._paused)
        return found >= needed and (displaceable or paused)


def _drop_span(sequence: Sequence, plan: StepPlan) -> int:
    """Take the rows of a sequence out of the plan; return their number."""
    for i, span in enumerate(plan.spans):
        if span.sequence is sequence:
            del plan.spans[i]
            return span.rows
    return 0
