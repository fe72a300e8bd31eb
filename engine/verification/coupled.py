"""Verification: from the target's logits behind drafted tokens to the tokens that are appended to each sequence.

Plain decoding is the verification of an empty draft. What ends a sequence (an end-of-text token among the accepted
ones, max_tokens) is not judged here: who commits the tokens cuts them off.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.request import TokenLogprobs
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.logprobs import token_logprobs
from pilotfish.engine.sampling.noise import ACCEPT, RESIDUAL, row_key, uniform
from pilotfish.engine.sampling.processors import Support, adjust, truncate
from pilotfish.engine.sampling.sampler import argmax, choose, race
from pilotfish.engine.speculation.drafters.drafter import Draft
from pilotfish.engine.verification.rejection import accept_or_redraw, residual


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step appends to a sequence: the accepted part of its draft, and one token of the target's own."""

    tokens: list[int]
    accepted: int
    """Drafted tokens among them: len(tokens) - 1."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of tokens, of the raw logits; None unless the request asks for them."""


class Verifier(Protocol):
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        """One Verdict for each span.

        logits: (rows, vocab) of the target, raw, the rows of `spans` one after the other; may be changed. For every i
        spans[i].draft == drafts[i].tokens and spans[i].rows == len(drafts[i].tokens) + 1.
        """
        ...


class CoupledVerifier:
    """A drafted token is accepted while it is the very token that the target draws at its place.

    What the target draws there depends on its distribution and on noise keyed by seed and place, so the text is the
    same with any draft (drafter-invariant speculative decoding, arXiv 2408.07978).

    lazy: look at the rows behind a drafted token only once it is accepted. By default so on the CPU, where rows cost
    time and looking at a result costs none; elsewhere all rows are drawn at once.
    """

    def __init__(self, eos_token_ids: Seq[int], lazy: bool | None = None) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._lazy = lazy

    @torch.inference_mode()
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        starts = _starts(spans, drafts)
        raw = _raw_rows(logits, spans, starts)
        logits = adjust(logits, spans, self._eos_token_ids)
        lazy = logits.device.type == "cpu" if self._lazy is None else self._lazy
        tokens = _drawn_lazily(logits, spans, drafts, starts) if lazy else _drawn(logits, spans, drafts)
        return _verdicts(spans, tokens, raw)


def _drawn(logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[list[int]]:
    """Each span's tokens up to the first that was not drafted, all rows drawn at once."""
    greedy = all(span.sequence.params.greedy for span in spans)
    drawn = argmax(logits) if greedy else choose(logits, rows_of(spans))
    tokens = []
    start = 0
    for draft in drafts:
        end = start + len(draft.tokens)
        for at, drafted in enumerate(draft.tokens, start):
            if drawn[at] != drafted:
                end = at
                break
        tokens.append(drawn[start : end + 1])
        start += len(draft.tokens) + 1
    return tokens


def _drawn_lazily(
    logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int]
) -> list[list[int]]:
    """The same, row by row; sampled rows in rounds, since their noise is made for several at once."""
    tokens: list[list[int]] = [[] for _ in spans]
    open_spans = []
    for i, (span, draft) in enumerate(zip(spans, drafts, strict=True)):
        if not span.sequence.params.greedy:
            open_spans.append(i)
            continue
        for at, drafted in enumerate((*draft.tokens, None), starts[i]):
            (token,) = argmax(logits[at : at + 1])
            tokens[i].append(token)
            if token != drafted:
                break
    while open_spans:
        rows = [
            LogitRow(starts[i] + len(tokens[i]), spans[i].sequence, spans[i].first_place + len(tokens[i]))
            for i in open_spans
        ]
        for i, token in zip(open_spans, choose(logits, rows), strict=True):
            tokens[i].append(token)
        open_spans = [i for i in open_spans if tuple(tokens[i]) == drafts[i].tokens[: len(tokens[i])]]
    return tokens


class RejectionVerifier:
    """Accept a drafted token with probability min(1, p / q), else draw from what is left of p.

    Speculative sampling, arXiv 2211.17192 and 2302.01318; q is the distribution that the draft was drawn from, or 1 on
    its token. The tokens have the target's distribution, but which they are depends on the draft: the same seed and the
    same drafts give the same text. `lazy` as in CoupledVerifier. on_device: judge without a look at the
    numbers; by default so but on the CPU.
    """

    def __init__(self, eos_token_ids: Seq[int], lazy: bool | None = None, on_device: bool | None = None) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._lazy = lazy
        self._on_device = on_device

    @torch.inference_mode()
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        starts = _starts(spans, drafts)
        raw = _raw_rows(logits, spans, starts)
        logits = adjust(logits, spans, self._eos_token_ids)
        lazy = logits.device.type == "cpu" if self._lazy is None else self._lazy
        on_device = logits.device.type != "cpu" if self._on_device is None else self._on_device
        judge = _judge_on_device if on_device else _accept_or_redraw
        return _verdicts(spans, _judged(logits, spans, drafts, starts, lazy, judge), raw)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row to judge, and what was drafted at the place that it predicts: nothing behind the last drafted token."""

    logits: LogitRow
    drafted: int | None
    probs: torch.Tensor | None
    """The distribution that `drafted` was drawn from, (vocab,)."""


def _starts(spans: list[LogitSpan], drafts: list[Draft]) -> list[int]:
    """The first row of each span, and behind them how many there are."""
    starts = [0]
    for span, draft in zip(spans, drafts, strict=True):
        if span.rows != len(draft.tokens) + 1:
            raise ValueError(f"a span of {span.rows} rows cannot verify {len(draft.tokens)} drafted tokens")
        starts.append(starts[-1] + span.rows)
    return starts


def _raw_rows(logits: torch.Tensor, spans: list[LogitSpan], starts: list[int]) -> dict[int, torch.Tensor]:
    """Copies of the rows of those spans that want log-probabilities, which are the raw model's: `adjust` works in
    place."""
    wanted = [i for i, span in enumerate(spans) if span.sequence.params.logprobs is not None]
    return {i: logits[starts[i] : starts[i + 1]].clone() for i in wanted}


def _judged(
    logits: torch.Tensor,
    spans: list[LogitSpan],
    drafts: list[Draft],
    starts: list[int],
    lazy: bool,
    judge: Callable[[torch.Tensor, list[_Row]], list[int]],
) -> list[list[int]]:
    """Follow each draft up to the first row whose token is not the drafted one."""
    tokens: list[list[int]] = [[] for _ in spans]
    open_spans = list(range(len(spans)))
    while open_spans:
        rows: list[_Row] = []
        for i in open_spans:
            at = len(tokens[i])
            for r in range(at, at + 1 if lazy else spans[i].rows):
                row = LogitRow(starts[i] + r, spans[i].sequence, spans[i].first_place + r)
                rows.append(_row(row, drafts[i], r))
        judged = iter(zip(rows, judge(logits, rows), strict=True))
        still_open = []
        for i in open_spans:
            going = True
            for _ in range(1 if lazy else spans[i].rows):
                row_of, token = next(judged)
                if going:
                    tokens[i].append(token)
                    going = token == row_of.drafted
            if going:
                still_open.append(i)
        open_spans = still_open
    return tokens


def _row(logits: LogitRow, draft: Draft, r: int) -> _Row:
    if r == len(draft.tokens):
        return _Row(logits, None, None)
    return _Row(logits, draft.tokens[r], None if draft.probs is None else draft.probs[r])


def _verdicts(spans: list[LogitSpan], tokens: list[list[int]], raw: dict[int, torch.Tensor]) -> list[Verdict]:
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    if raw:
        rows = torch.cat([block[: len(tokens[i])] for i, block in raw.items()])
        top = [spans[i].sequence.params.logprobs or 0 for i in raw for _ in tokens[i]]
        found = iter(token_logprobs(rows, [token for i in raw for token in tokens[i]], top))
        logprobs = {i: tuple(next(found) for _ in tokens[i]) for i in raw}
    return [Verdict(own, len(own) - 1, logprobs.get(i)) for i, own in enumerate(tokens)]


def _judge_on_device(adjusted: torch.Tensor, rows: list[_Row]) -> list[int]:
    logits, drafted, probs = [row.logits for row in rows], [row.drafted for row in rows], [row.probs for row in rows]
    judged: list[int] = accept_or_redraw(adjusted, logits, drafted, probs).tolist()
    return judged


def _accept_or_redraw(adjusted: torch.Tensor, rows: list[_Row]) -> list[int]:
    """Rejection verification's judge: the drafted token or one from the residual; greedy rows by their likeliest."""
    by_index = {row.logits.at: row for row in rows}
    greedy = [row.logits for row in rows if row.logits.sequence.params.greedy]
    tokens = dict(zip((row.at for row in greedy), choose(adjusted, greedy), strict=True))
    for support in truncate(adjusted, [row.logits for row in rows]):
        judged = _judge_sampled(support, [by_index[row.at] for row in support.rows])
        tokens |= dict(zip((row.at for row in support.rows), judged, strict=True))
    return [tokens[row.logits.at] for row in rows]


def _judge_sampled(support: Support, rows: list[_Row]) -> list[int]:
    tokens = [-1 if row.drafted is None else row.drafted for row in rows]
    column, present = _find(support, tokens)
    p = support.probabilities()
    p_drafted = torch.where(present, p.gather(1, column), 0.0).squeeze(1).tolist()
    q_drafted = [1.0] * len(rows)
    soft = [(i, row.probs[row.drafted]) for i, row in enumerate(rows) if row.probs is not None]
    if soft:
        for (i, _), q_i in zip(soft, torch.stack([q_i for _, q_i in soft]).tolist(), strict=True):
            q_drafted[i] = q_i
    redrawn = []
    for i, row in enumerate(rows):
        key = row_key(row.logits.sequence.seed, row.logits.place, ACCEPT)
        if row.drafted is not None and uniform(key) * q_drafted[i] >= p_drafted[i]:
            redrawn.append(i)
    if redrawn:
        q = _drafters(support, rows, redrawn, column, present)
        left = Support([support.rows[i] for i in redrawn], support.of(redrawn).ids, residual(p[redrawn], q).log_())
        for i, token in zip(redrawn, race(left, RESIDUAL), strict=True):
            tokens[i] = token
    undrafted = [i for i, row in enumerate(rows) if row.drafted is None]
    if undrafted:
        for i, token in zip(undrafted, race(support.of(undrafted)), strict=True):
            tokens[i] = token
    return tokens


def _find(support: Support, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's token in the support, and whether it is there: (rows, 1) each."""
    wanted = on_device(tokens, support.logits.device).unsqueeze(1)
    if support.whole:
        return wanted.clamp(min=0), wanted >= 0
    column = (support.ids == wanted).int().argmax(1, keepdim=True)
    return column, support.ids.gather(1, column) == wanted


def _drafters(
    support: Support, rows: list[_Row], which: list[int], column: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """q, the distributions that the tokens of rows `which` were drawn from, over the support: (len(which), count)."""
    q = torch.zeros(len(which), support.logits.shape[1], device=support.logits.device)
    q.scatter_(1, column[which], present[which].float())
    for line, i in enumerate(which):
        probs = rows[i].probs
        if probs is not None:
            q[line] = probs if support.whole else probs[support.ids[i]]
    return q
