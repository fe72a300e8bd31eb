"""Rejection verification's judgement without the host looking: one copy to the device, none back. For GPUs; what is
decided is what `verify` decides on the CPU, up to rounding, and how is explained there."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device.transfer import arrays_to_device
from pilotfish.engine.sampling.logit_spans import LogitRow
from pilotfish.engine.sampling.noise import ACCEPT, RESIDUAL, gumbel_race, key_halves, row_key, uniform
from pilotfish.engine.sampling.processors import kept_of_all, limits_of, scale_rows, temperatures_of


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What is left of p once a token drawn from q is rejected, not normalized: max(0, p - q), (rows, tokens) each.

    p itself where nothing is left: then p and q differ by rounding alone.
    """
    left = (p - q).clamp_(min=0.0)
    return torch.where(left.amax(1, keepdim=True) > 0.0, left, p)


@torch.inference_mode()
def accept_or_redraw(
    adjusted: torch.Tensor, rows: Seq[LogitRow], drafted: Seq[int | None], probs: Seq[torch.Tensor | None]
) -> torch.Tensor:
    """A token for each of `rows` of `adjusted`, (all rows, vocab): the drafted one or another, (len(rows),) int64.

    drafted: the token drafted at each row's place; probs: the distribution that it was drawn from, (vocab,), or None
    where the drafter was certain.
    """
    greedy = [i for i, row in enumerate(rows) if row.sequence.params.greedy]
    sampled = [i for i, row in enumerate(rows) if not row.sequence.params.greedy]
    mine = [rows[i] for i in sampled]
    soft = [line for line, i in enumerate(sampled) if drafted[i] is not None and probs[i] is not None]
    keys = [[row_key(row.sequence.seed, row.place, *stream) for row in mine] for stream in ((), (RESIDUAL,))]
    chances = [uniform(row_key(row.sequence.seed, row.place, ACCEPT)) for row in mine]
    params = [row.sequence.params for row in mine]
    at_greedy, places_greedy, at, places, draws, redraws, column, has, chance, lines, temperatures, limits = (
        arrays_to_device(
            [
                np.array([rows[i].at for i in greedy], dtype=np.int64),
                np.array(greedy, dtype=np.int64),
                np.array([row.at for row in mine], dtype=np.int64),
                np.array(sampled, dtype=np.int64),
                key_halves(keys[0]),
                key_halves(keys[1]),
                np.array([[drafted[i] or 0] for i in sampled], dtype=np.int64).reshape(-1, 1),
                np.array([drafted[i] is not None for i in sampled], dtype=np.float32).reshape(-1, 1),
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
        tokens.index_copy_(0, places_greedy, adjusted.index_select(0, at_greedy).argmax(1))
    if not sampled:
        return tokens
    scaled = scale_rows(adjusted.index_select(0, at), temperatures)
    totals = 1.0 / torch.softmax(scaled, 1).amax(1, keepdim=True)
    kept = kept_of_all(scaled, totals, limits)
    p = torch.softmax(kept, 1)
    q = torch.zeros_like(p).scatter_(1, column, has)
    if soft:
        given = [given for line in soft if (given := probs[sampled[line]]) is not None]
        q.index_copy_(0, lines, torch.stack(given).float())
    rejected = chance * q.gather(1, column).double() >= p.gather(1, column).double()
    redrawn = gumbel_race(residual(p, q).log_(), redraws).unsqueeze(1)
    judged = torch.where(rejected, redrawn, column)
    judged = torch.where(has > 0, judged, gumbel_race(kept, draws).unsqueeze(1))
    return tokens.index_copy_(0, places, judged.squeeze(1))
