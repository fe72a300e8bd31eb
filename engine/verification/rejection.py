"""Rejection verification, also called speculative sampling (arXiv 2211.17192 and 2302.01318)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.device.transfer import arrays_to_device
from pilotfish.engine.draft import Draft
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.noise import ACCEPT, RESIDUAL, gumbel_race, key_halves, row_key, uniform
from pilotfish.engine.sampling.processors import (
    Support,
    any_typical,
    kept_of_all,
    limits_of,
    scale_rows,
    temperatures_of,
    truncate,
)
from pilotfish.engine.sampling.sampler import choose, race
from pilotfish.engine.verification.verifier import DraftedRow, Verdict, agreed, drafted_row, lazily, verdicts


class RejectionVerifier:
    """Accepts a drafted token with probability min(1, p / q), and otherwise draws from the residual.

    q is the distribution that the draft was drawn from, or 1 on its token. The tokens have the target's distribution,
    but which they are depends on the draft: the same seed and the same drafts give the same text.

    sync_free: judge all rows at once on the device, without the host reading numbers in between.
    """

    keyed = False

    def __init__(self, eos_token_ids: Seq[int], sync_free: bool = False) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._sync_free = sync_free

    @torch.inference_mode()
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        return verdicts(logits, spans, drafts, self._eos_token_ids, self._draw)

    def _draw(
        self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int]
    ) -> list[list[int]]:
        if not self._sync_free:
            return lazily(logits, spans, drafts, starts, _accept_or_redraw)
        parts = zip(starts, spans, drafts, strict=False)
        rows = [drafted_row(start, span, draft, r) for start, span, draft in parts for r in range(span.rows)]
        return agreed(_accept_or_redraw_sync_free(logits, rows).tolist(), drafts, starts)


def _accept_or_redraw_sync_free(adjusted: torch.Tensor, rows: list[DraftedRow]) -> torch.Tensor:
    """As `_accept_or_redraw`, up to rounding, with one copy to the device and none back: (len(rows),) int64."""
    greedy = [i for i, row in enumerate(rows) if row.logits.sequence.params.greedy]
    sampled = [i for i, row in enumerate(rows) if not row.logits.sequence.params.greedy]
    mine = [rows[i].logits for i in sampled]
    drafted = [rows[i].drafted for i in sampled]
    soft = [line for line, i in enumerate(sampled) if rows[i].probs is not None]
    keys = [[row_key(row.sequence.seed, row.position, *stream) for row in mine] for stream in ((), (RESIDUAL,))]
    chances = [uniform(row_key(row.sequence.seed, row.position, ACCEPT)) for row in mine]
    params = [row.sequence.params for row in mine]
    at_greedy, positions_greedy, at, positions, draws, redraws, column, has, chance, lines, temperatures, limits = (
        arrays_to_device(
            [
                np.array([rows[i].logits.at for i in greedy], dtype=np.int64),
                np.array(greedy, dtype=np.int64),
                np.array([row.at for row in mine], dtype=np.int64),
                np.array(sampled, dtype=np.int64),
                key_halves(keys[0]),
                key_halves(keys[1]),
                np.array([[token or 0] for token in drafted], dtype=np.int64).reshape(-1, 1),
                np.array([token is not None for token in drafted], dtype=np.float32).reshape(-1, 1),
                np.array(chances, dtype=np.float64).reshape(-1, 1),
                np.array(soft, dtype=np.int64),
                temperatures_of(params).reshape(-1, 1),
                limits_of(params),
            ],
            adjusted.device,
        )
    )
    tokens = torch.empty(len(rows), dtype=torch.int64, device=adjusted.device)
    if greedy:
        tokens.index_copy_(0, positions_greedy, adjusted.index_select(0, at_greedy).argmax(1))
    if not sampled:
        return tokens
    scaled = scale_rows(adjusted.index_select(0, at), temperatures)
    totals = 1.0 / torch.softmax(scaled, 1).amax(1, keepdim=True)
    kept = kept_of_all(scaled, totals, limits, any_typical(params))
    p = torch.softmax(kept, 1)
    q = torch.zeros_like(p).scatter_(1, column, has)
    if soft:
        given = [probs for i in sampled if (probs := rows[i].probs) is not None]
        q.index_copy_(0, lines, torch.stack(given).float())
    rejected = chance * q.gather(1, column).double() >= p.gather(1, column).double()
    redrawn = gumbel_race(residual(p, q).log_(), redraws).unsqueeze(1)
    judged = torch.where(rejected, redrawn, column)
    judged = torch.where(has > 0, judged, gumbel_race(kept, draws).unsqueeze(1))
    return tokens.index_copy_(0, positions, judged.squeeze(1))


def _accept_or_redraw(adjusted: torch.Tensor, rows: list[DraftedRow]) -> list[int]:
    """The `Judge` of rejection verification: the drafted token or one from the residual; argmax for greedy rows."""
    by_index = {row.logits.at: row for row in rows}
    greedy = [row.logits for row in rows if row.logits.sequence.params.greedy]
    tokens = dict(zip((row.at for row in greedy), choose(adjusted, greedy), strict=True))
    for support in truncate(adjusted, [row.logits for row in rows]):
        judged = _judge_sampled(support, [by_index[row.at] for row in support.rows])
        tokens |= dict(zip((row.at for row in support.rows), judged, strict=True))
    return [tokens[row.logits.at] for row in rows]


def _judge_sampled(support: Support, rows: list[DraftedRow]) -> list[int]:
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
        key = row_key(row.logits.sequence.seed, row.logits.position, ACCEPT)
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
    """Return each row's column of its token in the support, and whether it is there: (rows, 1) each."""
    wanted = on_device(tokens, support.logits.device).unsqueeze(1)
    if support.whole:
        return wanted.clamp(min=0), wanted >= 0
    column = (support.ids == wanted).int().argmax(1, keepdim=True)
    return column, support.ids.gather(1, column) == wanted


def _drafters(
    support: Support, rows: list[DraftedRow], which: list[int], column: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Return q, the distributions that rows `which` were drafted from, over the support: (len(which), count)."""
    q = torch.zeros(len(which), support.logits.shape[1], device=support.logits.device)
    q.scatter_(1, column[which], present[which].float())
    for line, i in enumerate(which):
        probs = rows[i].probs
        if probs is not None:
            q[line] = probs if support.whole else probs[support.ids[i]]
    return q


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the residual of p after a token drawn from q is rejected, not normalized: max(0, p - q), (rows, tokens);
    p itself where that is 0 everywhere, since then p and q differ only by rounding."""
    left = (p - q).clamp_(min=0.0)
    return torch.where(left.amax(1, keepdim=True) > 0.0, left, p)
