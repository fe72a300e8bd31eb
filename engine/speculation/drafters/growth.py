"""Growth: the loop that grows drafts token by token, one pass of a drafter's model for each. EAGLE-3 heads and draft
models share it; they read a sequence's backlog themselves.

On the CPU the host reads each token, and a draft ends where its drafter is no longer confident. On a GPU that would
synchronize host and device between passes. There drafts grow sync-free: the host reads them once, when they are done,
and then cuts off what the drafter is not confident of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.device.transfer import ids_to_device
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.draft_steps import DraftSteps, Growing, Grown
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.sampling import device_sampler
from pilotfish.engine.sampling.device_sampler import chances_of, why_not_keyed
from pilotfish.engine.sampling.logit_spans import LogitSpan, rows_of
from pilotfish.engine.sampling.processors import adjust
from pilotfish.engine.sampling.sampler import argmax, draw
from pilotfish.engine.speculation.drafters.drafter import DraftRequest

NextPass = Callable[[list[Span], torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""Runs a pass over spans of one row each and returns its logits, (spans, draft vocabulary).

The second argument has the rows of the previous pass that go on, in the order of the spans, (spans,) int64 on the
device; None: all of them. The third has the spans' tokens, (spans,) int64, if those are only on the device.
"""


Confidences = Callable[[], torch.Tensor]
"""Returns a drafter's confidences in the tokens of the last logits, (rows,) float32, on the device."""


class Several(Protocol):
    """Runs several passes at once, each over the tokens that the one before has drawn."""

    def count(self, rows: int, passes: int) -> int:
        """How many it would run, of `passes` that are wanted; 0: none."""
        ...

    def run(self, count: int, drafts: list[Growing], tokens: torch.Tensor, kept: torch.Tensor | None) -> Grown | None:
        """See `DraftSteps.run`; `kept` is as in NextPass. None: nothing was run."""
        ...


@dataclass(slots=True)
class GrowingDraft:
    """A sequence's draft while it grows."""

    request: DraftRequest
    blocks: BlockTable
    """The sequence's blocks in the drafter's own KV cache."""
    start: int
    """Position in that cache of the first drafted token."""
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    """Tokens that passes have written to the cache; sync-free, they may be more than `tokens`, which are cut."""

    @property
    def plain(self) -> bool:
        """Whether the target takes the argmax of its raw logits."""
        params = self.request.sequence.params
        return params.greedy and not params.alters_logits

    @property
    def keyed(self) -> bool:
        """Whether the target draws by its raw logits, position, seed and temperature, up to truncation."""
        return not self.request.sequence.params.alters_logits

    def span(self, token: int, depth: int) -> Span:
        """Return the span of the draft's token number `depth`, from 1."""
        return Span([token], self.start + depth - 1, self.blocks.blocks, logit_rows=1)

    def growing(self, depth: int) -> Growing:
        """Return how it grows on by several passes, once it has `depth` tokens."""
        sequence = self.request.sequence
        limit, params = self.request.limit - depth, sequence.params
        return Growing(self.span(0, depth), limit, sequence.seed, len(sequence.tokens) + depth, params.temperature)


def finished(requests: list[DraftRequest], growing: Mapping[str, GrowingDraft], drafter: str) -> list[Draft]:
    """Return a Draft for each of `requests`, from the grown drafts by sequence id."""
    drafts = []
    for request in requests:
        if (grown := growing.get(request.sequence.id)) is None:
            drafts.append(NO_DRAFT)
        else:
            probs = torch.stack(grown.probs) if grown.probs else None
            drafts.append(Draft(tuple(grown.tokens), probs, drafter, confidences=tuple(grown.confidences)))
    return drafts


class Growth:
    """Grows the drafts of one drafter.

    keep_probs: keep the distributions that tokens are drawn from, which rejection verification needs.
    sync_free: grow drafts without the host reading tokens in between, where possible: not with `keep_probs`, nor if a
    distribution depends on the tokens before.
    target_ids: the token id of each column of the draft's logits, (draft vocabulary,) int64 on the device, where the
    draft has a vocabulary of its own; `vocab_size` is then the target's.
    """

    def __init__(
        self,
        eos_token_ids: Seq[int],
        keep_probs: bool,
        sync_free: bool,
        vocab_size: int = 0,
        target_ids: torch.Tensor | None = None,
    ) -> None:
        self.sync_free = sync_free
        self.eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self.keep_probs = keep_probs
        self.target_ids = target_ids
        self.host_ids: list[int] | None = None if target_ids is None else target_ids.tolist()

    @property
    def drafts_ahead(self) -> bool:
        """Whether several passes may be run before any token is read."""
        return self.sync_free and not self.keep_probs

    def grow(
        self,
        logits: torch.Tensor,
        drafts: list[GrowingDraft],
        next_pass: NextPass,
        several: Several | None = None,
        confidences: Confidences | None = None,
    ) -> list[int]:
        """Grow `drafts` from the logits of their first tokens, (len(drafts), draft vocabulary), and return the rows of
        each pass that it took. `several` is asked first where no token needs more than its key and temperature.
        `confidences`: of the tokens of the last logits, in the place of their probabilities."""
        if not drafts:
            return []
        params = [draft.request.sequence.params for draft in drafts]
        if self.sync_free and not self.keep_probs and not any(each.depends_on_text for each in params):
            size = self._vocab_size or logits.shape[1]
            if any(why_not_keyed(each, size) not in ("", "logprobs") for each in params):
                several = None
            return self._grow_sync_free(logits, drafts, next_pass, several, confidences)
        return self._grow_on_host(logits, drafts, next_pass, confidences)

    def _grow_on_host(
        self,
        logits: torch.Tensor,
        drafts: list[GrowingDraft],
        next_pass: NextPass,
        confidences: Confidences | None,
    ) -> list[int]:
        passes: list[int] = []
        survival = [1.0] * len(drafts)
        going = list(range(len(drafts)))
        while True:
            tokens, chances = self._draw(logits, [drafts[i] for i in going])
            if confidences is not None:
                chances = confidences().tolist()
            rows = []
            for row, (i, token, confidence) in enumerate(zip(going, tokens, chances, strict=True)):
                draft = drafts[i]
                draft.tokens.append(token)
                draft.confidences.append(confidence)
                survival[i] *= confidence
                if len(draft.tokens) < draft.request.limit and survival[i] >= draft.request.floor:
                    rows.append(row)
                    draft.computed.append(token)
            if not rows:
                return passes
            kept = None if len(rows) == len(going) else on_device(rows, logits.device)
            going = [going[row] for row in rows]
            passes.append(len(going))
            spans = [drafts[i].span(drafts[i].tokens[-1], len(drafts[i].tokens)) for i in going]
            logits = next_pass(spans, kept, None)

    def _draw(self, logits: torch.Tensor, drafts: list[GrowingDraft]) -> tuple[list[int], list[float]]:
        """Return the next token of each draft, drawn with the target's noise, and the drafter's confidence in it."""
        if not self.keep_probs and all(draft.plain for draft in drafts):
            columns = argmax(logits)
            tokens = columns if self.host_ids is None else [self.host_ids[column] for column in columns]
            return tokens, chances_of(logits, on_device(columns, logits.device)).tolist()
        spans = [LogitSpan(draft.request.sequence, tuple(draft.tokens), rows=1) for draft in drafts]
        tokens, processed = draw(self.whole(logits), spans, self.eos_token_ids)
        if self.keep_probs:
            # Of a draft vocabulary without any token that may be drawn, nothing is likely.
            probs = torch.softmax(processed.float(), dim=-1).nan_to_num_(0.0)
            for draft, row, token in zip(drafts, probs, tokens, strict=True):
                if draft.request.sequence.params.greedy:  # certain
                    row = torch.zeros_like(row)
                    row[token] = 1.0
                draft.probs.append(row)
        return tokens, chances_of(processed, on_device(tokens, processed.device)).tolist()

    def _grow_sync_free(
        self,
        logits: torch.Tensor,
        drafts: list[GrowingDraft],
        next_pass: NextPass,
        several: Several | None,
        confidences: Confidences | None,
    ) -> list[int]:
        passes: list[int] = []
        going = list(range(len(drafts)))
        drawn: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        tokens, chances = self._draw_sync_free(logits, drafts, 0)
        drawn.append((going, tokens, chances if confidences is None else confidences()))
        while True:
            depth = len(drawn)
            rows = [row for row, i in enumerate(going) if drafts[i].request.limit > depth]
            if not rows:
                break
            kept = None if len(rows) == len(going) else ids_to_device(rows, tokens.device)
            going = [going[row] for row in rows]
            tokens = tokens if kept is None else tokens.index_select(0, kept)
            left = [drafts[i].request.limit - depth for i in going]
            grown = None
            if several is not None and (count := several.count(len(going), max(left))):
                grown = several.run(count, [drafts[i].growing(depth) for i in going], tokens, kept)
            if grown is not None:
                for j in range(grown.tokens.shape[1]):
                    passes.append(len(going))
                    # Of drafts that are long enough nothing more is wanted.
                    members = [i if count > j else -1 for i, count in zip(going, left, strict=True)]
                    drawn.append((members, grown.tokens[:, j].clone(), grown.chances[:, j].clone()))
                tokens = drawn[-1][1]
                continue
            passes.append(len(going))
            logits = next_pass([drafts[i].span(0, depth) for i in going], kept, tokens)
            tokens, chances = self._draw_sync_free(logits, [drafts[i] for i in going], depth)
            drawn.append((going, tokens, chances if confidences is None else confidences()))
        _read(drawn, drafts)
        return passes

    def _draw_sync_free(
        self, logits: torch.Tensor, drafts: list[GrowingDraft], depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_draw`, but returns tensors on the device, (len(drafts),) int64 and float32."""
        if all(draft.plain for draft in drafts):
            columns = logits.argmax(1)
            chances = chances_of(logits, columns)
            return columns if self.target_ids is None else self.target_ids.index_select(0, columns), chances
        # The drafted tokens are unknown on the host: only their number matters here.
        spans = [LogitSpan(draft.request.sequence, (0,) * depth, rows=1) for draft in drafts]
        adjusted = adjust(self.whole(logits), spans, self.eos_token_ids)
        return device_sampler.draw(adjusted, rows_of(spans), chances=True)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits over the target's vocabulary, (rows, vocab): -inf for tokens outside the draft's."""
        if self.target_ids is None:
            return logits
        whole = logits.new_full((len(logits), self._vocab_size), float("-inf"))
        return whole.index_copy_(1, self.target_ids, logits)


@dataclass(slots=True)
class Carried:
    """The hidden states that a head's next pass reads: the last pass's, (rows, size)."""

    hidden: torch.Tensor

    def rows(self, kept: torch.Tensor | None) -> torch.Tensor:
        return self.hidden if kept is None else self.hidden.index_select(0, kept)


class SeveralPasses:
    """`Several` by captured runs. `carried`: of a head."""

    def __init__(self, steps: DraftSteps, carried: Carried | None = None) -> None:
        self._steps, self._carried = steps, carried

    def count(self, rows: int, passes: int) -> int:
        return self._steps.count(rows, passes)

    def run(self, count: int, drafts: list[Growing], tokens: torch.Tensor, kept: torch.Tensor | None) -> Grown | None:
        hidden = None if self._carried is None else self._carried.rows(kept)
        grown = self._steps.run(count, drafts, tokens, hidden)
        if self._carried is not None and grown is not None and grown.hidden is not None:
            self._carried.hidden = grown.hidden
        return grown


def longest(plan: GraphPlan) -> int:
    """The passes of the longest draft, by the captured passes of a plan: one of them reads what came before."""
    return max((bucket.length for bucket in plan.buckets), default=1) - 2


def _read(drawn: list[tuple[list[int], torch.Tensor, torch.Tensor]], drafts: list[GrowingDraft]) -> None:
    """Read all tokens and chances, which waits for the device, and cut each draft where confidence ends."""
    tokens = torch.cat([tokens for _, tokens, _ in drawn]).double()  # holds token ids exactly
    chances = torch.cat([chances for _, _, chances in drawn]).double()
    values = iter(zip(*torch.stack((tokens, chances)).tolist(), strict=True))
    for going, _, _ in drawn:
        for i, (token, chance) in zip(going, values, strict=False):
            if i >= 0:
                drafts[i].tokens.append(int(token))
                drafts[i].confidences.append(chance)
    for draft in drafts:
        draft.computed = draft.tokens[:-1]
        count = confident(draft.confidences, draft.request.floor)
        draft.tokens, draft.confidences = draft.tokens[:count], draft.confidences[:count]


def confident(chances: Seq[float], floor: float) -> int:
    """Return the number of tokens up to and including the first at which the product of chances is below the floor."""
    survival = 1.0
    for count, chance in enumerate(chances, start=1):
        survival *= chance
        if survival < floor:
            return count
    return len(chances)
