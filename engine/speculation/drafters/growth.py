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

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.device.transfer import ids_to_device
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.sampling import device_sampler
from pilotfish.engine.sampling.device_sampler import chances_of
from pilotfish.engine.sampling.logit_spans import LogitSpan, rows_of
from pilotfish.engine.sampling.processors import adjust
from pilotfish.engine.sampling.sampler import argmax, draw
from pilotfish.engine.speculation.drafters.drafter import DraftRequest

NextPass = Callable[[list[Span], torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""Runs a pass over spans of one row each and returns its logits, (spans, draft vocabulary).

The second argument has the rows of the previous pass that go on, in the order of the spans, (spans,) int64 on the
device; None: all of them. The third has the spans' tokens, (spans,) int64, if those are only on the device.
"""


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

    def span(self, token: int, depth: int) -> Span:
        """Return the span of the draft's token number `depth`, from 1."""
        return Span([token], self.start + depth - 1, self.blocks.blocks, logit_rows=1)


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
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._keep_probs = keep_probs
        self._target_ids = target_ids
        self._host_ids: list[int] | None = None if target_ids is None else target_ids.tolist()

    def grow(self, logits: torch.Tensor, drafts: list[GrowingDraft], next_pass: NextPass) -> list[int]:
        """Grow `drafts` from the logits of their first tokens, (len(drafts), draft vocabulary), and return the rows of
        each pass that it took."""
        if not drafts:
            return []
        params = [draft.request.sequence.params for draft in drafts]
        if self.sync_free and not self._keep_probs and not any(each.depends_on_text for each in params):
            return self._grow_sync_free(logits, drafts, next_pass)
        return self._grow_on_host(logits, drafts, next_pass)

    def _grow_on_host(self, logits: torch.Tensor, drafts: list[GrowingDraft], next_pass: NextPass) -> list[int]:
        passes: list[int] = []
        survival = [1.0] * len(drafts)
        going = list(range(len(drafts)))
        while True:
            drawn = self._draw(logits, [drafts[i] for i in going])
            rows = []
            for row, (i, token, confidence) in enumerate(zip(going, *drawn, strict=True)):
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
        if not self._keep_probs and all(draft.plain for draft in drafts):
            columns = argmax(logits)
            tokens = columns if self._host_ids is None else [self._host_ids[column] for column in columns]
            return tokens, chances_of(logits, on_device(columns, logits.device)).tolist()
        spans = [LogitSpan(draft.request.sequence, tuple(draft.tokens), rows=1) for draft in drafts]
        tokens, processed = draw(self._whole(logits), spans, self._eos_token_ids)
        if self._keep_probs:
            # Of a draft vocabulary without any token that may be drawn, nothing is likely.
            probs = torch.softmax(processed.float(), dim=-1).nan_to_num_(0.0)
            for draft, row, token in zip(drafts, probs, tokens, strict=True):
                if draft.request.sequence.params.greedy:  # certain
                    row = torch.zeros_like(row)
                    row[token] = 1.0
                draft.probs.append(row)
        return tokens, chances_of(processed, on_device(tokens, processed.device)).tolist()

    def _grow_sync_free(self, logits: torch.Tensor, drafts: list[GrowingDraft], next_pass: NextPass) -> list[int]:
        passes: list[int] = []
        going = list(range(len(drafts)))
        drawn: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        while True:
            tokens, chances = self._draw_sync_free(logits, [drafts[i] for i in going], len(drawn))
            drawn.append((going, tokens, chances))
            depth = len(drawn)
            rows = [row for row, i in enumerate(going) if drafts[i].request.limit > depth]
            if not rows:
                break
            kept = None if len(rows) == len(going) else ids_to_device(rows, tokens.device)
            going = [going[row] for row in rows]
            passes.append(len(going))
            tokens = tokens if kept is None else tokens.index_select(0, kept)
            logits = next_pass([drafts[i].span(0, depth) for i in going], kept, tokens)
        _read(drawn, drafts)
        return passes

    def _draw_sync_free(
        self, logits: torch.Tensor, drafts: list[GrowingDraft], depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_draw`, but returns tensors on the device, (len(drafts),) int64 and float32."""
        if all(draft.plain for draft in drafts):
            columns = logits.argmax(1)
            chances = chances_of(logits, columns)
            return columns if self._target_ids is None else self._target_ids.index_select(0, columns), chances
        # The drafted tokens are unknown on the host: only their number matters here.
        spans = [LogitSpan(draft.request.sequence, (0,) * depth, rows=1) for draft in drafts]
        adjusted = adjust(self._whole(logits), spans, self._eos_token_ids)
        return device_sampler.draw(adjusted, rows_of(spans), chances=True)

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits over the target's vocabulary, (rows, vocab): -inf for tokens outside the draft's."""
        if self._target_ids is None:
            return logits
        whole = logits.new_full((len(logits), self._vocab_size), float("-inf"))
        return whole.index_copy_(1, self._target_ids, logits)


def _read(drawn: list[tuple[list[int], torch.Tensor, torch.Tensor]], drafts: list[GrowingDraft]) -> None:
    """Read all tokens and chances, which waits for the device, and cut each draft where confidence ends."""
    tokens = torch.cat([tokens for _, tokens, _ in drawn]).double()  # holds token ids exactly
    chances = torch.cat([chances for _, _, chances in drawn]).double()
    values = iter(zip(*torch.stack((tokens, chances)).tolist(), strict=True))
    for going, _, _ in drawn:
        for i, (token, chance) in zip(going, values, strict=False):
            drafts[i].tokens.append(int(token))
            drafts[i].confidences.append(chance)
    for draft in drafts:
        draft.computed = draft.tokens[:-1]
        count = _confident(draft.confidences, draft.request.floor)
        draft.tokens, draft.confidences = draft.tokens[:count], draft.confidences[:count]


def _confident(chances: Seq[float], floor: float) -> int:
    """Return the number of tokens up to and including the first at which the product of chances is below the floor."""
    survival = 1.0
    for count, chance in enumerate(chances, start=1):
        survival *= chance
        if survival < floor:
            return count
    return len(chances)
