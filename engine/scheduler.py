"""The scheduler decides which sequences advance in a step, and by how many tokens. It handles blocks, but neither
tensors nor models.

Continuous batching with chunked prefill: decoding sequences come first and always get their rows; the rest of the
step's token budget goes to prompts, oldest first, in chunks. So a long prompt costs the others one chunk's time a step.
When blocks run out, the youngest running sequence is preempted: it releases all of its blocks and is recomputed later.
The oldest can always go on, so there is no deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from pilotfish.engine.draft import NO_DRAFT, Draft, shortened
from pilotfish.engine.memory.block_pool import BlockPool
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

    @property
    def rows(self) -> int:
        return sum([span.stop - span.start for span in self.spans])


class Scheduler:
    """Plans steps of at most `max_batch_tokens` rows, over at most `max_num_seqs` running sequences."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_batch_tokens: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
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
        unread = sum(len(s.tokens) - s.computed for s in self.running if not s.decoding)
        if len(self.running) < self._max_num_seqs:
            unread += sum(len(sequence.tokens) for sequence in islice(self.waiting, self._max_num_seqs))
        return min(unread, self._max_batch_tokens)

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
        for sequence in self.running:
            if not sequence.decoding:
                budget -= self._chunk(sequence, budget, plan)
        if not plan.preemptions:
            self._admit(budget, plan)
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

    def _chunk(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Plan the next piece of a sequence's prompt; returns its rows."""
        stop = min(len(sequence.tokens), sequence.computed + budget)
        if stop <= sequence.computed:
            return 0
        plan.spans.append(PlannedSpan(sequence, sequence.computed, stop, draws=stop == len(sequence.tokens)))
        return stop - sequence.computed

    def _admit(self, budget: int, plan: StepPlan) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
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
            budget -= self._chunk(sequence, budget, plan)
