"""Checks of noise, truncation and drawing on this device, against the same in NumPy on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan
from pilotfish.engine.sampling.noise import _bits31, log_exponential, row_key
from pilotfish.engine.sampling.processors import truncate
from pilotfish.engine.sampling.sampler import choose, draw
from pilotfish.engine.sequence import Sequence as Decoding
from pilotfish.tools.selftest import reference
from pilotfish.tools.selftest.check import Check, Finding
from pilotfish.tools.selftest.subject import Subject

VOCABULARY = 32_000
EDGE = 1e-5
"""Share of the probability, or of a score, within which rounding may put a token on either side of an edge."""

CUTS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "top_k and top_p": {"top_k": 100, "top_p": 0.8, "temperature": 1.3},
}


def checks(subject: Subject) -> Iterator[Check]:
    sampling = _Sampling(subject)
    here, wrong = f"on {subject.device}", "wrong tokens"
    exact = "whole numbers: every bit must be the same"
    close = "logarithms are rounded in their last places: 4 units"
    near = f"sums in float32: a token that is within {EDGE:g} of the edge may fall to either side, no other"
    yield Check("noise, bits", f"the noise's random bits {here} with NumPy's", sampling.bits, "wrong numbers", exact)
    yield Check("noise, log E", f"Gumbel noise {here} with float64's", sampling.noise, "units", close)
    for name, cut in CUTS.items():
        compares = f"the tokens that {name} keeps {here} with those of a sorted list in float64"
        yield Check(f"truncation, {name}", compares, partial(sampling.truncation, cut), wrong, near)
    compares = f"the likeliest tokens {here} with NumPy's"
    yield Check("greedy tokens", compares, sampling.greedy, wrong, "comparisons only")
    compares = f"tokens drawn {here} with argmax(logit - log E) in float64"
    yield Check("drawn tokens", compares, sampling.drawn, wrong, near)


class _Sampling:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.device = subject, subject.device
        self.count = 8 if subject.quick else 64
        self.tokens = np.arange(VOCABULARY)
        self.ids = torch.from_numpy(self.tokens).unsqueeze(0).to(self.device)
        self.keys = [row_key(seed * 0x9E3779B9 + 17, 3 + seed) for seed in range(self.count)]

    def bits(self) -> Finding:
        found = _bits31(self.keys, self.ids).cpu().numpy()
        wrong = int((found.astype(np.uint32) != reference.bits31(self.keys, self.tokens)).sum())
        return Finding(measured=wrong, bound=0, detail=f"of {found.size:,}")

    def noise(self) -> Finding:
        found = log_exponential(self.keys, self.ids).cpu().double().numpy()
        wanted = reference.log_exponential(reference.bits31(self.keys, self.tokens))
        errors = np.abs(found - wanted) / np.maximum(1.0, np.abs(wanted))
        return Finding(measured=float(errors.max()) / torch.finfo(torch.float32).eps, bound=4.0)

    def truncation(self, cut: dict[str, Any]) -> Finding:
        logits, wrong, kept_in_all = self._logits(), 0, 0
        rows = [LogitRow(i, _sequence(i, SamplingParams(**cut)), 9) for i in range(self.count)]
        (support,) = truncate(logits.to(self.device), rows)
        for i, row in enumerate(rows):
            columns = torch.nonzero(support.logits[i] > -torch.inf).squeeze(1)
            kept = set(support.ids[i if len(support.ids) > 1 else 0][columns].tolist())
            sure, possible = _kept(logits[i].double().numpy(), row.sequence.params)
            wrong += len(sure - kept) + len(kept - possible)
            kept_in_all += len(kept)
        return Finding(measured=wrong, bound=0, detail=f"{kept_in_all:,} tokens kept of {self.count} rows")

    def greedy(self) -> Finding:
        logits = self._logits()
        rows = [LogitRow(i, _sequence(i, SamplingParams(temperature=0.0)), 9) for i in range(self.count)]
        found = choose(logits.to(self.device), rows)
        return Finding(
            measured=int((logits.numpy().argmax(1) != np.array(found)).sum()), bound=0, detail=f"of {self.count}"
        )

    def drawn(self) -> Finding:
        """Compare tokens drawn in both ways: from logits (`draw`), and from adjusted logits (`choose`)."""
        logits, wrong = self._logits(), 0
        sequences = [_sequence(i, SamplingParams(temperature=0.8, seed=i)) for i in range(self.count)]
        spans = [LogitSpan(sequence) for sequence in sequences]
        rows = [LogitRow(i, sequence, len(sequence.tokens)) for i, sequence in enumerate(sequences)]
        ways = draw(logits.to(self.device, copy=True), spans)[0], choose(logits.to(self.device), rows)
        for i, row in enumerate(rows):
            key = row_key(row.sequence.seed, row.position)
            noise = reference.log_exponential(reference.bits31([key], self.tokens))[0]
            scores = logits[i].double().numpy() / 0.8 - noise
            best = scores.max()
            wrong += sum(best - scores[found[i]] > EDGE * max(1.0, abs(best)) for found in ways)
        return Finding(measured=wrong, bound=0, detail=f"of {self.count}")

    def _logits(self) -> torch.Tensor:
        return 3 * self.subject.random(self.count, VOCABULARY, seed=21)


def _kept(row: np.ndarray, params: SamplingParams) -> tuple[set[int], set[int]]:
    """Return the tokens that must be kept of a row of logits, and those that may be."""
    scaled = (row - row.max()) / params.temperature
    order, before = reference.cumulative(scaled)
    if 0 < params.top_k < len(row):
        order = order[: params.top_k]
        _, before = reference.cumulative(scaled[order])
    likely = np.exp(scaled[order])
    sure = (before < params.top_p - EDGE) & (likely >= params.min_p * (1 + EDGE))
    possible = (before < params.top_p + EDGE) & (likely >= params.min_p * (1 - EDGE))
    return set(order[sure].tolist()), set(order[possible].tolist())


def _sequence(number: int, params: SamplingParams) -> Decoding:
    request = Request(id=str(number), prompt_ids=(1, 2, 3), params=params)
    return Decoding(request=request, seed=number, blocks=BlockTable(BlockPool(1, 16)))
