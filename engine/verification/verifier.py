"""Verification turns the target's logits for drafted tokens into the tokens that are appended to each sequence.

Plain decoding is the verification of an empty draft. Verification does not look for the end of a sequence (an
end-of-text token among the accepted ones, max_tokens): the engine core cuts the tokens off as it commits them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.request import TokenLogprobs
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan
from pilotfish.engine.sampling.logprobs import token_logprobs
from pilotfish.engine.sampling.processors import adjust


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tokens that a step appends to a sequence: the accepted part of its draft, and one of the target's own."""

    tokens: list[int]
    accepted: int
    """Number of drafted tokens among them: len(tokens) - 1."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of tokens, of the raw logits; None unless the request asks for them."""


class Verifier(Protocol):
    keyed: bool
    """Whether rows without anything special get the tokens of `device_sampler.draw_keyed`, so that the pass may draw
    them itself (`drawn_verdicts`)."""

    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        """Return one Verdict for each span.

        logits: (rows, vocab) of the target, raw, the rows of `spans` one after the other; may be changed. For every i
        spans[i].draft == drafts[i].tokens and spans[i].rows == len(drafts[i].tokens) + 1.
        """
        ...


class DraftedRow(NamedTuple):
    """A row of logits, and the token drafted at the position that it predicts."""

    logits: LogitRow
    drafted: int | None
    """None for the row after the last drafted token."""
    probs: torch.Tensor | None
    """The distribution that `drafted` was drawn from, (vocab,); None if its drafter put probability 1 on it."""


Judge = Callable[[torch.Tensor, list[DraftedRow]], list[int]]
"""Returns the token of each of the given rows of adjusted logits, (all rows, vocab)."""

Draw = Callable[[torch.Tensor, list[LogitSpan], list[Draft], list[int]], list[list[int]]]
"""Draws each span's tokens up to the first that was not drafted, from adjusted logits; the last argument has the first
row of each span."""


def drafted_row(start: int, span: LogitSpan, draft: Draft, r: int) -> DraftedRow:
    """Return row `r` of a span whose rows begin at `start`."""
    row = LogitRow(start + r, span.sequence, span.first_position + r)
    if r == len(draft.tokens):
        return DraftedRow(row, None, None)
    return DraftedRow(row, draft.tokens[r], None if draft.probs is None else draft.probs[r])


def lazily(
    logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int], judge: Judge
) -> list[list[int]]:
    """A `Draw` that computes the row after a drafted token only once that token is accepted, which saves work on the
    CPU. It goes in rounds over all spans, since noise is made for several rows at once."""
    tokens: list[list[int]] = [[] for _ in spans]
    going = list(range(len(spans)))
    while going:
        rows = [drafted_row(starts[i], spans[i], drafts[i], len(tokens[i])) for i in going]
        judged = judge(logits, rows)
        for i, token in zip(going, judged, strict=True):
            tokens[i].append(token)
        going = [i for i, row, token in zip(going, rows, judged, strict=True) if token == row.drafted]
    return tokens


def agreed(tokens: list[int], drafts: list[Draft], starts: list[int]) -> list[list[int]]:
    """Return each span's tokens up to the first that was not drafted, from the tokens of all rows."""
    found = []
    for start, draft in zip(starts, drafts, strict=False):
        end = start + len(draft.tokens)
        for at, drafted in enumerate(draft.tokens, start):
            if tokens[at] != drafted:
                end = at
                break
        found.append(tokens[start : end + 1])
    return found


def drawn_verdicts(tokens: list[int], drafts: list[Draft]) -> list[Verdict]:
    """Return the verdicts of coupled verification over tokens that the pass has drawn: one for each row of each span,
    the spans' rows one after the other."""
    starts = [0]
    for draft in drafts:
        starts.append(starts[-1] + len(draft.tokens) + 1)
    return [Verdict(own, len(own) - 1) for own in agreed(tokens, drafts, starts)]


def verdicts(
    logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], eos_token_ids: Seq[int], draw: Draw
) -> list[Verdict]:
    """Adjust the logits, `draw`, and add the requested log-probabilities: the part that all verifiers share."""
    starts = [0]
    for span, draft in zip(spans, drafts, strict=True):
        if span.rows != len(draft.tokens) + 1:
            raise ValueError(f"a span of {span.rows} rows cannot verify {len(draft.tokens)} drafted tokens")
        starts.append(starts[-1] + span.rows)
    # Log-probabilities are the raw model's, and `adjust` works in place.
    wanted = [i for i, span in enumerate(spans) if span.sequence.params.logprobs is not None]
    raw = {i: logits[starts[i] : starts[i + 1]].clone() for i in wanted}
    tokens = draw(adjust(logits, spans, eos_token_ids), spans, drafts, starts)
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    if raw:
        rows = torch.cat([block[: len(tokens[i])] for i, block in raw.items()])
        top = [spans[i].sequence.params.logprobs or 0 for i in raw for _ in tokens[i]]
        found = iter(token_logprobs(rows, [token for i in raw for token in tokens[i]], top))
        logprobs = {i: tuple(next(found) for _ in tokens[i]) for i in raw}
    return [Verdict(own, len(own) - 1, logprobs.get(i)) for i, own in enumerate(tokens)]
