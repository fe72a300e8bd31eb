"""Row: the figures of one arm in one visit; and the statistics over rows. Nothing here runs a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pilotfish.tools.bench.arms import VANILLA


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one arm on one suite of prompts, at one concurrency, in one round."""

    model: str
    arm: str
    suite: str
    concurrency: int
    round: int
    tokens_per_second: float
    """Output tokens of all requests by the time from the first one's start to the last one's end."""
    speedup: float
    """tokens_per_second as a multiple of vanilla's in the same round, suite and concurrency."""
    mean_accepted_length: float
    """Tokens that a request gets from a step in which it decodes, the target's own one included: 1 without drafts."""
    acceptance_rate: float | None
    """Accepted by drafted tokens; None where nothing was drafted."""
    ttft_ms: float
    """Time from a request's start to its first token, the median over the requests."""
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    """Time between a token and the one before, over all requests; tokens of one step share it evenly. None where every
    answer is one token."""
    identical_text: bool
    """Every answer is, token by token, the one that vanilla gives in the same round at the same concurrency."""


@dataclass(frozen=True, slots=True)
class Summary:
    """An arm at one concurrency, over all rounds and suites."""

    arm: str
    concurrency: int
    speedups: dict[str, float]
    """The median over the rounds of the ratio within a round, by suite."""
    speedup: float
    """The geometric mean of those."""
    tokens_per_second: float
    """Geometric mean over the suites of the median over the rounds."""
    mean_accepted_length: float
    identical_text: bool


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Summarize one model's rows by concurrency and arm, in the order of their first appearance."""
    loads = dict.fromkeys(row.concurrency for row in rows)
    names = dict.fromkeys((VANILLA, *(row.arm for row in rows)))
    cells = [
        (load, name, [r for r in rows if (r.concurrency, r.arm) == (load, name)]) for load in loads for name in names
    ]
    return [_summary(load, name, cell) for load, name, cell in cells if cell]


def _summary(concurrency: int, arm: str, rows: Sequence[Row]) -> Summary:
    suites = dict.fromkeys(row.suite for row in rows)

    def medians(of: Callable[[Row], float]) -> dict[str, float]:
        return {suite: statistics.median(of(row) for row in rows if row.suite == suite) for suite in suites}

    speedups = medians(lambda row: row.speedup)
    return Summary(
        arm=arm,
        concurrency=concurrency,
        speedups=speedups,
        speedup=statistics.geometric_mean(speedups.values()),
        tokens_per_second=statistics.geometric_mean(medians(lambda row: row.tokens_per_second).values()),
        mean_accepted_length=statistics.fmean(medians(lambda row: row.mean_accepted_length).values()),
        identical_text=all(row.identical_text for row in rows),
    )
