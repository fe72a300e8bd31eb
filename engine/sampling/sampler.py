"""Drawing tokens: argmax for greedy rows, the position-keyed exponential race for the others.

A row's token depends on the row's distribution, the sequence's seed and the position alone (promise 2 of the design;
drafter-invariant speculative decoding, arXiv 2408.07978). `processors` makes the distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.kernels.draw import can_draw
from pilotfish.engine.kernels.draw import draw as draw_native
from pilotfish.engine.sampling import device_sampler
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.noise import DRAW, log_exponential, row_key
from pilotfish.engine.sampling.processors import Support, adjust, is_restricted, spread, temperature_of, truncate

# Elements of noise made at once on the CPU: the few arrays of this size that it takes stay in a core's cache.
_CHUNK = 1 << 17
# Elements of logits from which tokens are drawn at once on a GPU: sorting a row's vocabulary for top_p takes some 60
# bytes for each, so with hundreds of rows, gigabytes.
_DRAWN = 1 << 23


@torch.inference_mode()
def draw(logits: torch.Tensor, spans: Seq[LogitSpan], eos_token_ids: Seq[int] = ()) -> tuple[list[int], torch.Tensor]:
    """Return the token that `choose` draws for each row, and what it was drawn from: `process` of these arguments."""
    adjusted = adjust(logits, spans, eos_token_ids)
    tokens, supports = _draw(adjusted, rows_of(spans))
    return tokens, spread(adjusted, supports)


def choose(adjusted: torch.Tensor, rows: Seq[LogitRow]) -> list[int]:
    """Return a token for each of `rows` of `adjusted`, (all rows, vocab) from `adjust`: argmax, or drawn."""
    if adjusted.device.type != "cpu":
        most = max(1, _DRAWN // adjusted.shape[1])
        parts = [rows]
        if len(rows) > most and any(not row.sequence.params.greedy for row in rows):
            parts = [rows[start : start + most] for start in range(0, len(rows), most)]
        tokens = [device_sampler.draw(adjusted, part)[0] for part in parts]
        drawn: list[int] = (tokens[0] if len(tokens) == 1 else torch.cat(tokens)).tolist()
        return drawn
    return _choose(adjusted, rows) if can_draw(adjusted) else _draw(adjusted, rows)[0]


def _choose(adjusted: torch.Tensor, rows: Seq[LogitRow]) -> list[int]:
    """As `_draw`, without the supports of rows that the native kernels draw."""
    vocab = adjusted.shape[1]
    free: list[LogitRow] = []
    rest: list[LogitRow] = []
    for row in rows:
        params = row.sequence.params
        (rest if params.greedy or is_restricted(params, vocab) else free).append(row)
    if not free:
        return _draw(adjusted, rows)[0]
    tokens = dict(zip(free, _drawn_whole(adjusted, free), strict=True))
    tokens.update(zip(rest, _draw(adjusted, rest)[0], strict=True))
    return [tokens[row] for row in rows]


def _drawn_whole(adjusted: torch.Tensor, rows: Seq[LogitRow]) -> list[int]:
    """Draw from the whole vocabulary, by the native kernels."""
    keys = [row_key(row.sequence.seed, row.position) for row in rows]
    temperatures = [temperature_of(row.sequence.params) for row in rows]
    return draw_native(adjusted, [row.at for row in rows], keys, temperatures)


def _draw(adjusted: torch.Tensor, rows: Seq[LogitRow]) -> tuple[list[int], list[Support]]:
    tokens = _greedy(adjusted, rows)
    supports = truncate(adjusted, rows) if len(tokens) < len(rows) else []
    for support in supports:
        natively = support.whole and can_draw(adjusted)
        drawn = _drawn_whole(adjusted, support.rows) if natively else race(support)
        tokens.update(zip((row.at for row in support.rows), drawn, strict=True))
    return [tokens[row.at] for row in rows], supports


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
    """Return the column of each row's highest score, the first of equals, on the host; scores (rows, columns)."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        columns: list[int] = scores.numpy().argmax(1).tolist()  # numpy's is vectorized, ten times as fast as torch's
        return columns
    columns = scores.argmax(1).tolist()
    return columns


def _greedy(logits: torch.Tensor, rows: Seq[LogitRow]) -> dict[int, int]:
    """Return the likeliest tokens of the greedy rows among `rows`, by row index."""
    wanted = [row.at for row in rows if row.sequence.params.greedy]
    if not wanted:
        return {}
    if wanted == list(range(len(logits))):
        return dict(zip(wanted, argmax(logits), strict=True))
    if logits.device.type == "cpu":  # row by row, since gathering the rows would cost more than looking through them
        return {index: argmax(logits[index : index + 1])[0] for index in wanted}
    return dict(zip(wanted, argmax(logits.index_select(0, on_device(wanted, logits.device))), strict=True))
