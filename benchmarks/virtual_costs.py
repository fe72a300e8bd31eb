"""The time in `virtual_clock.py`: tables of measured passes, and a clock that advances by them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Milliseconds, by numbers of rows; interpolated linearly between them, and extrapolated from the last two."""

    verifying: dict[int, float]
    """A pass of the target by its rows, with logits of each."""
    reading: dict[int, float]
    """A pass of the target by its rows, with logits of one row."""
    context_token: float
    """Time per token in the KV cache of the pass's sequences."""
    drafting: dict[str, dict[int, float]]
    """A pass of a drafter by its rows, by the drafter's name."""
    step: float = 0.35
    sequence: float = 0.05
    """The engine's own work in a step, and for each of its sequences: about what `step_overhead.py` measures; the same
    for all arms."""


COSTS = {
    # On two shared cores, float32, 200 tokens of context: the least of 150 passes up to 16 rows and of 24 beyond.
    "smollm2-135m": Costs(
        verifying={
            1: 10.0, 2: 11.3, 4: 11.4, 6: 12.2, 8: 12.8, 9: 13.1, 12: 14.0, 16: 17.6, 24: 23.9, 32: 29.3, 48: 43.4,
            64: 54.7, 96: 84.1, 128: 108.8, 256: 238.5,
        },
        reading={
            1: 10.0, 2: 11.3, 4: 11.4, 6: 12.1, 8: 12.7, 9: 13.0, 12: 13.8, 16: 16.9, 24: 22.9, 32: 28.3, 48: 37.9,
            64: 49.2, 96: 71.7, 128: 98.1, 256: 187.9,
        },
        context_token=0.0017,
        drafting={
            "smollm2-135m-eagle3": {
                1: 0.63, 2: 0.65, 4: 0.72, 6: 0.85, 9: 0.98, 12: 1.08, 16: 1.26, 24: 1.73, 32: 2.14, 64: 3.78,
                256: 13.6,
            },
            "smollm2-135m-eagle3-small": {
                1: 0.31, 2: 0.32, 4: 0.37, 6: 0.46, 9: 0.56, 12: 0.62, 16: 0.72, 24: 1.08, 32: 1.20, 64: 2.16, 256: 8.0,
            },
        },
    ),
    "gemma-3-270m": Costs(
        verifying={
            1: 16.8, 2: 18.3, 4: 19.0, 6: 19.3, 9: 19.7, 12: 21.4, 16: 28.9, 24: 40.0, 32: 60.0, 48: 87.6, 64: 113.3,
            96: 172.3, 128: 233.2, 256: 460.9,
        },
        reading={
            1: 16.8, 2: 18.3, 4: 18.1, 6: 18.5, 9: 18.8, 12: 20.1, 16: 24.7, 24: 29.8, 32: 35.6, 48: 45.2, 64: 53.8,
            96: 74.3, 128: 98.9, 256: 184.0,
        },
        context_token=0.0008,
        drafting={
            "gemma-3-270m-eagle3": {
                1: 0.87, 2: 0.91, 4: 0.98, 6: 1.13, 9: 1.38, 12: 1.48, 16: 1.71, 24: 2.44, 32: 3.03, 64: 5.30,
                256: 18.8,
            },
        },
    ),
}  # fmt: skip


class Clock:
    """A clock in seconds. Each duration varies by a share of `jitter`, and one in a hundred is three times as long."""

    def __init__(self, costs: Costs, jitter: float) -> None:
        self.now = 0.0
        self._costs, self._jitter = costs, jitter
        self._random = random.Random(0)

    def __call__(self) -> float:
        return self.now

    def spend(self, milliseconds: float) -> float:
        """Advance by that much, jitter included; returns the seconds."""
        seconds = 1e-3 * milliseconds
        if self._jitter:
            seconds *= self._random.uniform(1 - self._jitter, 1 + self._jitter)
            seconds *= 3.0 if self._random.random() < 0.01 else 1.0
        self.now += seconds
        return seconds

    def target(self, rows: int, logit_rows: int, context: int) -> float:
        """Return the milliseconds of a pass of the target."""
        costs = self._costs
        head = line(costs.verifying, logit_rows) - line(costs.reading, logit_rows)
        return line(costs.reading, rows) + head + costs.context_token * context

    def draft(self, name: str, rows: int) -> float:
        return line(self._costs.drafting[name], rows)


def line(table: dict[int, float], rows: int) -> float:
    counts, values = list(table), list(table.values())
    if rows > counts[-1]:
        return values[-1] + (rows - counts[-1]) * (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return float(np.interp(rows, counts, values))
