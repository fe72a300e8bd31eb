"""Growth of drafts that were computed in one pass. Tokens are drawn from logits that are all there: for all positions
of a draft at once where none of them depends on the ones before, else in a chain, as DSpark's heads correct them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.device.transfer import ids_to_device
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.models.dspark import DSparkHeads
from pilotfish.engine.sampling import device_sampler
from pilotfish.engine.sampling.device_sampler import chances_of
from pilotfish.engine.sampling.logit_spans import LogitSpan, rows_of
from pilotfish.engine.sampling.processors import adjust
from pilotfish.engine.sampling.sampler import argmax, draw
from pilotfish.engine.speculation.drafters.growth import GrowingDraft, Growth, confident


def grow_block(growth: Growth, logits: torch.Tensor, drafts: Seq[GrowingDraft]) -> None:
    """Grow `drafts` from the logits of all their tokens, (len(drafts), positions, draft vocabulary), of at least as
    many positions as any of them may have tokens."""
    if growth.keep_probs or any(draft.request.sequence.params.depends_on_text for draft in drafts):
        rows = _Rows(logits)
        growth.grow(rows.step(), list(drafts), lambda spans, kept, tokens: rows.next(kept))
        return
    positions = logits.shape[1]
    tokens, chances = _draw(growth, logits.flatten(0, 1), drafts, positions)
    for i, draft in enumerate(drafts):
        part = slice(i * positions, i * positions + draft.request.limit)
        count = confident(chances[part], draft.request.floor)
        draft.tokens, draft.confidences = tokens[part][:count], chances[part][:count]


def _draw(
    growth: Growth, logits: torch.Tensor, drafts: Seq[GrowingDraft], positions: int
) -> tuple[list[int], list[float]]:
    """Return a token for each row, with the target's noise, and the drafter's confidence in it."""
    if all(draft.plain for draft in drafts):
        columns = argmax(logits)
        tokens = columns if growth.host_ids is None else [growth.host_ids[column] for column in columns]
        return tokens, chances_of(logits, on_device(columns, logits.device)).tolist()
    # Which tokens come before does not matter, only how many.
    spans = [LogitSpan(draft.request.sequence, (0,) * (positions - 1), rows=positions) for draft in drafts]
    if growth.sync_free:
        adjusted = adjust(growth.whole(logits), spans, growth.eos_token_ids)
        drawn, chances = device_sampler.draw(adjusted, rows_of(spans), chances=True)
        return drawn.tolist(), chances.tolist()
    tokens, processed = draw(growth.whole(logits), spans, growth.eos_token_ids)
    return tokens, chances_of(processed, on_device(tokens, processed.device)).tolist()


@torch.inference_mode()
def grow_chain(
    growth: Growth, heads: DSparkHeads, hidden: torch.Tensor, logits: torch.Tensor, drafts: Seq[GrowingDraft]
) -> None:
    """As `grow_block`, token by token with the heads, which also read the hidden states of the rows, (len(drafts),
    positions, hidden_size)."""
    chain = _Chain(heads, hidden, logits)
    last = [draft.request.sequence.tokens[-1] for draft in drafts]
    growth.grow(
        chain.step(ids_to_device(last, logits.device)),
        list(drafts),
        chain.next,
        confidences=chain.confidences if heads.has_confidence else None,
    )


class _Chain:
    """The logits of drafts that go on, each position's corrected by the tokens before."""

    def __init__(self, heads: DSparkHeads, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        self._heads, self._hidden, self._logits, self._at = heads, hidden, logits, 0
        self._state = heads.first_state(hidden[:, 0])
        self._confidence: torch.Tensor | None = None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits of the present position, (drafts that go on, draft vocabulary), after these tokens."""
        bias, self._confidence, self._state = self._heads.step(
            self._hidden[:, self._at].contiguous(), tokens, self._state
        )
        logits = self._logits[:, self._at]
        return logits if bias is None else logits + bias

    def next(self, spans: list[Span], kept: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
        """See `NextPass`."""
        self._at += 1
        if kept is not None:
            self._hidden, self._logits = self._hidden.index_select(0, kept), self._logits.index_select(0, kept)
            self._state = self._state.index_select(0, kept)
        if tokens is None:
            tokens = ids_to_device([span.token_ids[0] for span in spans], self._logits.device)
        return self.step(tokens)

    def confidences(self) -> torch.Tensor:
        """See `growth.Confidences`."""
        assert self._confidence is not None
        return self._confidence


class _Rows:
    """The logits of drafts that go on, position by position."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits, self._at = logits, 0

    def step(self) -> torch.Tensor:
        """(drafts that go on, draft vocabulary)"""
        return self._logits[:, self._at]

    def next(self, kept: torch.Tensor | None) -> torch.Tensor:
        """Of the next position; `kept` is as in `NextPass`."""
        self._at += 1
        if kept is not None:
            self._logits = self._logits.index_select(0, kept)
        return self.step()
