"""Drawing tokens: the likeliest for greedy rows, the position-keyed exponential race for the others.

A row's token depends on the row's distribution, the sequence's seed and the position alone (promise 2 of the design;
drafter-invariant speculative decoding, arXiv 2408.07978). What the distribution is, is `processors`' matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.sampling import device_sampler as on_device_
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.noise import DRAW, log_exponential, row_key
from pilotfish.engine.sampling.processors import Support, gather_support, truncate

# Elements of noise made at once on the CPU: the few arrays of this size that it takes stay in a core's cache.
_CHUNK = 1 << 17


@torch.inference_mode()
def draw(processed: torch.Tensor, spans: Seq[LogitSpan]) -> list[int]:
    """A token for each row of `processed`, (rows, vocab) from `process`: the one that `choose` draws."""
    rows = rows_of(spans)
    tokens = _greedy(processed, rows)
    for support in _supports(processed, [row for row in rows if not row.sequence.params.greedy]):
        for row, token in zip(support.rows, race(support), strict=True):
            tokens[row.at] = token
    return [tokens[row.at] for row in rows]


def choose(adjusted: torch.Tensor, rows: Seq[LogitRow]) -> list[int]:
    """A token for each of `rows` of `adjusted`, (all rows, vocab) from `adjust`: greedy, or drawn after truncation."""
    if adjusted.device.type != "cpu":
        drawn: list[int] = on_device_.draw(adjusted, rows)[0].tolist()
        return drawn
    tokens = _greedy(adjusted, rows)
    if len(tokens) < len(rows):
        for support in truncate(adjusted, rows):
            for row, token in zip(support.rows, race(support), strict=True):
                tokens[row.at] = token
    return [tokens[row.at] for row in rows]


def race(support: Support, stream: int = DRAW) -> list[int]:
    """Draw a token for each row: argmax(logit - log E), E exponential noise of (seed, position, token id) in `stream`.

    Logits being log w, the winner is token i with probability w_i / sum(w) (the Gumbel-max trick).
    """
    keys = [row_key(row.sequence.seed, row.position, stream) for row in support.rows]
    ids, logits = support.ids, support.logits
    per_chunk = max(1, _CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(keys)
    winners: list[int] = []
    for start in range(0, len(keys), per_chunk):
        part = slice(start, start + per_chunk)
        noise = log_exponential(keys[part], ids if support.whole else ids[part])
        winners += argmax(torch.sub(logits[part], noise, out=noise))
    if support.whole:
        return winners
    columns = on_device(winners, ids.device).unsqueeze(1)
    tokens: list[int] = ids.gather(1, columns).squeeze(1).tolist()
    return tokens


def argmax(scores: torch.Tensor) -> list[int]:
    """Column of the highest score of each row, the first of equals: (rows, columns) -> rows numbers on the host."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        columns: list[int] = scores.numpy().argmax(1).tolist()  # numpy's is vectorized, ten times as fast as torch's
        return columns
    columns = scores.argmax(1).tolist()
    return columns


def _greedy(logits: torch.Tensor, rows: Seq[LogitRow]) -> dict[int, int]:
    """The likeliest tokens of the greedy ones of `rows`, by row index."""
    wanted = [row.at for row in rows if row.sequence.params.greedy]
    if not wanted:
        return {}
    if wanted == list(range(len(logits))):
        return dict(zip(wanted, argmax(logits), strict=True))
    if logits.device.type == "cpu":  # row by row, since gathering the rows would cost more than looking through them
        return {index: argmax(logits[index : index + 1])[0] for index in wanted}
    return dict(zip(wanted, argmax(logits.index_select(0, on_device(wanted, logits.device))), strict=True))


def _supports(processed: torch.Tensor, rows: list[LogitRow]) -> list[Support]:
    """What `truncate` had found, read back from `process`'s logits: rows of few tokens as lists of those tokens."""
    if not rows:
        return []
    logits = processed.index_select(0, on_device([row.at for row in rows], processed.device))
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device).unsqueeze(0)
    whole = Support(rows, ids, logits)
    if logits.device.type != "cpu":
        return [whole]
    found = [np.flatnonzero(row > -math.inf) for row in logits.numpy()]
    few = [i for i, kept in enumerate(found) if len(kept) < logits.shape[1] // 2]
    if not few:
        return [whole]
    many = sorted(set(range(len(rows))).difference(few))
    short = gather_support([rows[i] for i in few], logits[few], [found[i] for i in few])
    return [short, whole.of(many)] if many else [short]
