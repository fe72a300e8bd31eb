"""Sync-free sampling for GPUs: one copy to the device, none back. It draws the tokens of `sampler.choose`, up to
rounding; `sampler` and `processors` explain how."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device.transfer import arrays_to_device, ids_to_device
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.sampling.logit_spans import LogitRow
from pilotfish.engine.sampling.noise import gumbel_race, key_halves, row_key
from pilotfish.engine.sampling.processors import (
    any_typical,
    is_restricted,
    kept_of_all,
    limits_of,
    scale_rows,
    temperatures_of,
)


@torch.inference_mode()
def draw(adjusted: torch.Tensor, rows: Seq[LogitRow], chances: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each of `rows` of `adjusted`, (all rows, vocab) from `adjust`: (len(rows),) int64, on its
    device; and, if `chances`, the probability of each, (len(rows),) float32 (else empty)."""
    device, vocab = adjusted.device, adjusted.shape[1]
    greedy = [i for i, row in enumerate(rows) if row.sequence.params.greedy]
    free: list[int] = []
    cut: list[int] = []
    for i, row in enumerate(rows):
        if not row.sequence.params.greedy:
            (cut if is_restricted(row.sequence.params, vocab) else free).append(i)
    at = [row.at for row in rows]
    if not free and not cut:
        logits = adjusted if at == list(range(len(adjusted))) else adjusted.index_select(0, ids_to_device(at, device))
        tokens = logits.argmax(1)
        return tokens, chances_of(logits, tokens) if chances else adjusted.new_empty(0)
    sampled = [rows[i] for i in (*free, *cut)]
    params = [row.sequence.params for row in sampled]
    every, greedy_at, greedy_positions, at_, positions, halves, temperatures, limits = arrays_to_device(
        [
            np.array(at, dtype=np.int64),
            np.array([at[i] for i in greedy], dtype=np.int64),
            np.array(greedy, dtype=np.int64),
            np.array([row.at for row in sampled], dtype=np.int64),
            np.array([*free, *cut], dtype=np.int64),
            key_halves([row_key(row.sequence.seed, row.position) for row in sampled]),
            temperatures_of(params),
            limits_of(params[len(free) :]),
        ],
        device,
    )
    tokens = torch.empty_like(every)
    found = torch.empty(len(rows) if chances else 0, device=device)
    if greedy:
        logits = adjusted.index_select(0, greedy_at)
        own = logits.argmax(1)
        tokens.index_copy_(0, greedy_positions, own)
        if chances:
            found.index_copy_(0, greedy_positions, chances_of(logits, own))
    scaled = scale_rows(adjusted.index_select(0, at_), temperatures)
    if cut:
        part = scaled[len(free) :]
        totals = 1.0 / torch.softmax(part, 1).amax(1, keepdim=True)
        kept = kept_of_all(part, totals, limits, any_typical(params[len(free) :]))
        scaled = torch.cat((scaled[: len(free)], kept)) if free else kept
    drawn = gumbel_race(scaled, halves)
    tokens.index_copy_(0, positions, drawn)
    if chances:
        found.index_copy_(0, positions, chances_of(scaled, drawn))
    return tokens, found


def draw_keyed(logits: torch.Tensor, keys: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row by its key and temperature alone, as `draw` does for rows that ask for nothing else.

    logits (rows, vocab), keys (rows,) int64 of `noise.row_keys`, temperatures (rows,) float32, 0 for the likeliest
    token -> (rows,) int64. The host reads nothing, so that it may be part of a captured pass.
    """
    logits = logits.float()
    halves = torch.stack((keys >> 32, keys)).to(torch.int32)
    greedy = temperatures == 0.0
    scaled = scale_rows(logits, temperatures.masked_fill(greedy, 1.0).unsqueeze(1))
    return torch.where(greedy, logits.argmax(1), gumbel_race(scaled, halves))


def why_not_keyed(params: SamplingParams, vocab: int) -> str:
    """Return what keeps `draw_keyed` from drawing this request's rows, as a word for metrics; "" if nothing does."""
    if params.logprobs is not None:
        return "logprobs"
    if params.constrained:
        return "grammar"
    if params.alters_logits:
        return "penalties"
    return "truncation" if not params.greedy and is_restricted(params, vocab) else ""


def chances_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the probability of each row's token under softmax(logits): tokens (rows,) int64 -> (rows,) float32."""
    logits = logits.float()
    of_tokens = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return (of_tokens - logits.logsumexp(1)).exp().clamp(0.0, 1.0).nan_to_num_(0.0)  # nan: nothing may be drawn
