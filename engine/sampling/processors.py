"""From a model's logits to the distribution that tokens are drawn from: bias, penalties, temperature, and truncation.

There are two stages. `adjust` changes logits of some rows: logit_bias, penalties, what may not be drawn. `truncate`
finds the tokens that sampled rows may draw: temperature, top_k, top_p, min_p, typical_p. `process` does both and
returns logits. All of it is batch-invariant: a row's result depends on that row alone, to the last bit. `sampler`
draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.sampling.bans import forbid
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.restrict import restrict

_HUGE = 1e30
_TINY = 1e-37
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Support:
    """The tokens that sampled rows may draw, after temperature and truncation."""

    rows: list[LogitRow]
    ids: torch.Tensor
    """Token ids, ascending, int64 (rows, count); or (1, vocab) int32, the whole vocabulary, for all rows. Rows with
    fewer tokens than others are filled up with id 0 at logit -inf."""
    logits: torch.Tensor
    """(rows, count) float32: -inf for tokens that may not be drawn; 0 for the likeliest of those before typical_p."""

    @property
    def whole(self) -> bool:
        """Whether the columns are all token ids, in every row."""
        return self.ids.dtype == torch.int32

    def of(self, lines: list[int]) -> Support:
        """Return the part with these `lines` (indices into `rows`)."""
        ids = self.ids if self.whole else self.ids[lines]
        return Support([self.rows[line] for line in lines], ids, self.logits[lines])

    def probabilities(self) -> torch.Tensor:
        """Return softmax(logits), (rows, count) float32."""
        if self.whole:
            return torch.softmax(self.logits, 1)
        mass = self.logits.exp().double()
        return (mass / mass.cumsum(1)[:, -1:]).float()  # a running sum does not depend on the filling of other rows


@torch.inference_mode()
def process(logits: torch.Tensor, spans: Seq[LogitSpan], eos_token_ids: Seq[int] = ()) -> torch.Tensor:
    """Return logits of the distribution that each row is drawn from: (rows, vocab), -inf for what may not be drawn.

    Per row, in this order: logit_bias, repetition penalty (over prompt and answer; arXiv 1909.05858), presence and
    frequency penalties (over the answer), allowed_token_ids, bad_words, min_tokens, grammar and thinking; then, unless
    greedy, temperature, top_k, top_p, min_p, typical_p. The answer includes the drafted tokens before the row. The
    likeliest token of a sampled row has the logit 0, unless typical_p has left it out.

    logits: (rows, vocab), the rows of `spans` one after the other; float32 is changed in place, other types are copied
    to float32. Returned as they are, whatever their type, if nothing applies (greedy and no adjustments).
    """
    logits = adjust(logits, spans, eos_token_ids)
    return spread(logits, truncate(logits, rows_of(spans)))


def spread(adjusted: torch.Tensor, supports: list[Support]) -> torch.Tensor:
    """Write the supports of `truncate` over the rows of `adjusted`: (rows, vocab), -inf for what may not be drawn."""
    for support in supports:
        adjusted = adjusted.float()
        shaped = support.logits
        if not support.whole:
            empty = torch.full((len(support.rows), adjusted.shape[1]), -math.inf, device=adjusted.device)
            shaped = empty.scatter_reduce_(1, support.ids, support.logits, "amax")
        adjusted.index_copy_(0, on_device([row.at for row in support.rows], adjusted.device), shaped)
    return adjusted


def adjust(logits: torch.Tensor, spans: Seq[LogitSpan], eos_token_ids: Seq[int] = ()) -> torch.Tensor:
    """Apply logit_bias, penalties, allowed_token_ids, bad_words, min_tokens, grammar and thinking; see `process`. Costs
    nothing for spans that use none of them."""
    if not any(span.sequence.params.alters_logits for span in spans):
        return logits
    with torch.inference_mode():
        return _adjusted(logits, spans, eos_token_ids)


def _adjusted(logits: torch.Tensor, spans: Seq[LogitSpan], eos_token_ids: Seq[int]) -> torch.Tensor:
    end = 0
    for span in spans:
        start, end = end, end + span.rows
        params = span.sequence.params
        if not params.alters_logits:
            continue
        early = min(params.min_tokens - (span.first_position - span.sequence.prompt_len), span.rows)
        if not (params.logit_bias or params.penalizes or params.forbids or params.constrained or early > 0):
            continue
        logits = logits.float()
        block = logits[start:end]
        if params.logit_bias:
            ids = on_device(list(params.logit_bias), logits.device)
            bias = on_device(list(params.logit_bias.values()), logits.device, torch.float32)
            block.index_add_(1, ids, bias.expand(span.rows, -1))
        if params.penalizes:
            _penalize(block, span)
        never = params.grammar is not None and params.ignore_eos and bool(eos_token_ids)
        unbanned = block.clone() if params.constrained and (params.forbids or early > 0 or never) else None
        if params.forbids or early > 0:
            forbid(block, span, max(0, early), [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)])
        if never:
            block.index_fill_(1, on_device(list(eos_token_ids), block.device), -math.inf)
        if params.constrained:
            restrict(block, unbanned, span)
    return logits


def _penalize(block: torch.Tensor, span: LogitSpan) -> None:
    """Repetition, presence and frequency penalties for the rows of one span, (rows, vocab), in place."""
    params, prompt_len = span.sequence.params, span.sequence.prompt_len
    repetition = params.repetition_penalty
    start = 0 if repetition != 1.0 else prompt_len
    text = [*span.sequence.tokens, *span.draft][start : span.first_position + span.rows - 1]
    if not text:
        return
    unique, columns = np.unique(np.array(text), return_inverse=True)
    known = span.first_position - start
    seen = np.zeros((span.rows, len(unique)), dtype=bool)
    seen[:, columns[:known]] = True
    counts = np.tile(np.bincount(columns[prompt_len - start : known], minlength=len(unique)), (span.rows, 1))
    for later, column in enumerate(columns[known:], start=1):
        seen[later:, column] = True
        counts[later:, column] += 1
    penalty = counts * params.frequency_penalty + (counts > 0) * params.presence_penalty
    ids = on_device(torch.from_numpy(unique), block.device)
    logits = block.index_select(1, ids).double()
    if repetition != 1.0:
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(on_device(torch.from_numpy(seen), block.device), repeated, logits)
    logits -= on_device(torch.from_numpy(penalty), block.device)
    block.index_copy_(1, ids, logits.clamp_(-_HUGE, _HUGE).float())


def truncate(logits: torch.Tensor, rows: Seq[LogitRow]) -> list[Support]:
    """Apply temperature, top_k, top_p, min_p and typical_p to the sampled ones of `rows`; greedy rows are left out.

    logits: (rows, vocab) from `adjust`; not changed. top_k keeps the likeliest k tokens, top_p the fewest likeliest of
    those that together have at least that share of their probability, min_p those at least that share as likely as the
    likeliest. Of equally likely tokens the lower ids go first. typical_p keeps, of what is left, the tokens whose
    information -log p is nearest to the distribution's entropy, until they have that share of its probability, and
    those that are as near as the last of them.
    """
    vocab = logits.shape[1]
    whole: list[LogitRow] = []
    cut: list[LogitRow] = []
    for row in rows:
        params = row.sequence.params
        if not params.greedy:
            (cut if is_restricted(params, vocab) else whole).append(row)
    supports = []
    if whole:
        ids = torch.arange(vocab, dtype=torch.int32, device=logits.device).unsqueeze(0)
        supports.append(Support(whole, ids, _scaled(logits, whole)))
    if cut:
        supports.append(_cut(_scaled(logits, cut), cut))
    return supports


def is_restricted(params: SamplingParams, vocab: int) -> bool:
    """Return whether top_k, top_p, min_p or typical_p may leave tokens out."""
    return 0 < params.top_k < vocab or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0


def temperature_of(params: SamplingParams) -> float:
    """Return a sampled request's temperature, as it is computed with: not 0."""
    return max(params.temperature, _TINY)


def temperatures_of(params: Seq[SamplingParams]) -> np.ndarray:
    """Return the temperatures, (rows, 1) float32, none of them 0."""
    return np.array([[temperature_of(p)] for p in params], dtype=np.float32)


def limits_of(params: Seq[SamplingParams]) -> np.ndarray:
    """Return the limits for `kept_of_all`, (4, rows, 1) float64: top_k, top_p, min_p and typical_p; infinite if
    unlimited."""
    limits = [(p.top_k if p.top_k > 0 else math.inf, _share(p.top_p), p.min_p, _share(p.typical_p)) for p in params]
    return np.array(limits, dtype=np.float64).reshape(-1, 4).T[:, :, None]


def _share(p: float) -> float:
    return p if p < 1.0 else math.inf


def any_typical(params: Iterable[SamplingParams]) -> bool:
    """Return whether `kept_of_all` has to look at typical_p."""
    return any(p.typical_p < 1.0 for p in params)


def scale_rows(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """(logits - highest) / temperature: (rows, vocab) float32; temperatures (rows, 1)."""
    logits = logits.float()
    return (logits - logits.amax(1, keepdim=True)) / temperatures


def _scaled(logits: torch.Tensor, rows: list[LogitRow]) -> torch.Tensor:
    """(logits - highest) / temperature of these rows, which cannot overflow: (rows, vocab) float32, a copy."""
    chosen = logits.index_select(0, on_device([row.at for row in rows], logits.device)).float()
    temperatures = [temperature_of(row.sequence.params) for row in rows]
    chosen -= chosen.amax(1, keepdim=True)
    if any(temperature != 1.0 for temperature in temperatures):
        chosen /= on_device(temperatures, logits.device).unsqueeze(1)
    return chosen


def _cut(scaled: torch.Tensor, rows: list[LogitRow]) -> Support:
    """Truncate rows of scaled logits, (rows, vocab)."""
    params = [row.sequence.params for row in rows]
    vocab = scaled.shape[1]
    totals = torch.ones(len(rows), 1, device=scaled.device)
    if any(p.top_p < 1.0 and not 0 < p.top_k < vocab for p in params):
        # In units of the likeliest token's probability. softmax sums each row in an order that no other row changes.
        totals = 1.0 / torch.softmax(scaled, 1).amax(1, keepdim=True)
    device = scaled.device
    if device.type != "cpu":
        whole = torch.arange(vocab, dtype=torch.int32, device=device).unsqueeze(0)
        limits = on_device(torch.from_numpy(limits_of(params)), device)
        return Support(rows, whole, kept_of_all(scaled, totals, limits, any_typical(params)))
    found = [kept_ids(*each) for each in zip(scaled, totals.squeeze(1).tolist(), params, strict=True)]
    columns = torch.zeros(len(rows), max(1, *map(len, found)), dtype=torch.int64)
    values = torch.full(columns.shape, -math.inf)
    for i, kept in enumerate(found):
        chosen = torch.from_numpy(kept)
        columns[i, : len(kept)] = chosen
        values[i, : len(kept)] = scaled[i, chosen]
    return Support(rows, columns, values)


def kept_ids(scaled: torch.Tensor, total: float, p: SamplingParams) -> np.ndarray:
    """Ids, ascending, of what top_k, top_p, min_p and typical_p keep of one row, (vocab,) on the CPU: (count,) int64.

    The highest logit is 0; total: the sum of exp(logits). Sorting the whole vocabulary would take the most time, so
    first everything below a level is left out that cannot be in the result. Nothing of a row of nan is kept.
    """
    vocab, row = len(scaled), scaled.numpy()
    floor = math.log(p.min_p) - 1e-3 if p.min_p else float(np.finfo(np.float32).min)
    levels = [floor]
    if 0 < p.top_k < vocab:
        # The k-th highest of the blocks' highest logits is no higher than the k-th highest of all.
        blocks = vocab // _BLOCK
        pool = scaled[: blocks * _BLOCK].view(blocks, _BLOCK).amax(1) if p.top_k <= blocks else scaled
        levels = [pool.topk(p.top_k, sorted=False).values.amin().item()]
    elif p.top_p < 1.0:
        tail = math.log((1.0 - p.top_p) * total)
        levels = [max(floor, tail + math.log(share)) for share in (1e-2, 1e-3, 1e-4)] + levels
    for level in levels:
        contenders = np.flatnonzero(row >= np.float32(level))
        if level == levels[-1] or np.exp(row[contenders], dtype=np.float64).sum() > p.top_p * total * (1 + 1e-9):
            break
    if not len(contenders):
        return contenders
    logits: np.ndarray = row[contenders]
    ordered = np.sort(logits)[::-1]
    count = min(len(ordered), p.top_k) if p.top_k > 0 else len(ordered)
    if p.top_p < 1.0:
        mass = np.exp(ordered[:count], dtype=np.float64).cumsum()
        share = p.top_p * (mass[-1] if 0 < p.top_k < vocab else total)
        count = min(count, int(np.searchsorted(mass, share)) + 1)
    if p.min_p:
        count = min(count, int(np.count_nonzero(ordered >= math.log(p.min_p))))
    kept: np.ndarray = contenders
    if count < len(ordered):
        lowest = ordered[count - 1]
        above = logits > lowest
        equal = np.flatnonzero(logits == lowest)
        above[equal[: count - np.count_nonzero(above)]] = True
        kept = contenders[above]
    return kept[_typical(row[kept], p.typical_p)] if p.typical_p < 1.0 and len(kept) else kept


def _typical(logits: np.ndarray, share: float) -> np.ndarray:
    """Which tokens typical_p keeps of one row's remaining ones, (count,): (count,) bool."""
    logp = np.maximum(logits.astype(np.float64), -_HUGE)  # 0 * -inf would be nan
    logp -= logp.max()
    logp -= np.log(np.exp(logp).sum())
    probs = np.exp(logp)
    distance = np.abs(-logp + (probs * logp).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int(np.count_nonzero(probs[order].cumsum() < share)), len(order) - 1)
    kept: np.ndarray = distance <= distance[order[last]]
    return kept


def kept_of_all(
    scaled: torch.Tensor, totals: torch.Tensor, limits: torch.Tensor, typical: bool = False
) -> torch.Tensor:
    """`kept_ids` for many rows at once, sync-free: returns `scaled` with -inf for the rest. For the GPU.

    scaled: (rows, vocab) float32, changed in place; totals: (rows, 1); limits: of `limits_of`; typical:
    `any_typical` of the same parameters. The same set as `kept_ids`, up to rounding.
    """
    top_k, top_p, min_p, typical_p = limits
    positions = torch.arange(scaled.shape[1], device=scaled.device)
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    mass = ordered.double().exp_().masked_fill_(positions >= top_k, 0.0)
    upto = mass.cumsum(1)
    total = torch.where(top_k < scaled.shape[1], upto[:, -1:], totals)
    keep = (positions < top_k) & (upto - mass < top_p * total) & (ordered >= min_p.log()) & (ordered > -math.inf)
    last = keep.sum(1, keepdim=True).sub_(1).clamp_(min=0)  # none is kept of a row of nan
    lowest, position = ordered.gather(1, last), order.gather(1, last)
    scaled.masked_fill_((scaled < lowest) | ((scaled == lowest) & (positions > position)), -math.inf)
    return _typical_of_all(scaled, typical_p) if typical else scaled


def _typical_of_all(scaled: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`_typical` for many rows at once, (rows, vocab), in place; share (rows, 1), infinite for rows that keep all."""
    logp = scaled.double().log_softmax(1)
    probs = logp.exp()
    distance = (-logp + torch.where(probs > 0, probs * logp, 0.0).sum(1, keepdim=True)).abs_()
    ordered, order = distance.sort(dim=1, stable=True)
    last = (probs.gather(1, order).cumsum(1) < share).sum(1, keepdim=True).clamp_(max=scaled.shape[1] - 1)
    return scaled.masked_fill_(distance > ordered.gather(1, last), -math.inf)
