"""The pace of prefill: how many rows of a prompt fit beside sequences that decode, by predicted time. No torch.

A pass takes about base + row * rows + pair * pairs seconds, where pairs counts the keys that each row sees. The three
are learned from the passes themselves by least squares on relative errors. A change of the machine's speed, such as
other work on it, is followed within a few passes, before the three are learned anew.
"""

from __future__ import annotations

import math

import numpy as np

BASE_ROWS = 16.0
"""Rows that take as long as a pass's base does, before anything is known: the CPU's figure."""
REMEMBER = 0.9
"""Weight of an observation relative to the next one of its kind."""
SPEED_GAIN, MOST_CHANGE = 0.4, 1.4
"""Share of an error of prediction, in its logarithm, that the next prediction is corrected by at once; and the largest
error that is believed."""
PRIOR = 0.02
"""Weight of the assumed proportions beside an observation's."""
LEAST_SHARE = 0.1
"""The least that each of the three may be of what was assumed: noise must not make rows or keys cost nothing."""
GRAIN, CAPTURED = 16, (128, 256, 512)
"""Rows of a step are a multiple of GRAIN up to the first of CAPTURED, the sizes that a GPU captures; then one of these,
then a multiple of the last."""
FIRST_ROWS = 64
"""Rows before any pass with a prompt was seen."""


_PRODUCTS, _FEATURES = np.array([[0, 1, 2], [1, 3, 4], [2, 4, 5]]), np.array([6, 7, 8])
"""Indices of the symmetric matrix of products, and of the features, in what `_Sums.values` returns."""


class _Sums:
    """Sums over observations, the older ones fading: the products of the features 1, rows and pairs, divided by the
    seconds squared, and the features, divided by the seconds."""

    def __init__(self) -> None:
        self._values: tuple[float, ...] = (0.0,) * 9

    def add(self, rows: int, pairs: int, seconds: float) -> None:
        one = 1 / seconds
        row, pair = rows * one, pairs * one
        new = (one * one, one * row, one * pair, row * row, row * pair, pair * pair, one, row, pair)
        self._values = tuple([REMEMBER * old + value for old, value in zip(self._values, new, strict=True)])

    def values(self) -> np.ndarray:
        return np.array(self._values)


class PrefillPace:
    """Bounds the seconds that prompts add to a step of sequences that decode.

    `bound`: seconds; 0: no bound. `pair_share`: assumed cost of a (row, key) pair relative to that of a row.
    """

    def __init__(self, bound: float = 0.0, pair_share: float = 1e-4) -> None:
        self.bound = bound or math.inf
        self._assumed = np.array([BASE_ROWS, 1.0, max(pair_share, 1e-9)])
        self._decoding, self._reading = _Sums(), _Sums()  # of steps without and with prompts
        self._costs: tuple[float, float, float] | None = None
        self._speed = 0.0  # the log of the present seconds relative to what the three say
        self._prompts_seen = False

    def observe(self, rows: int, pairs: int, prompts: bool, seconds: float) -> None:
        """Observe the seconds of a pass; `prompts`: whether rows of prompts were among its rows."""
        if seconds <= 0 or math.isinf(self.bound):
            return
        if not prompts:
            self._decoding.add(rows, pairs, seconds)
            self._costs = None
            return
        expected = self._log_of(rows, pairs) + self._speed if self._prompts_seen else math.log(seconds)
        error = max(-MOST_CHANGE, min(MOST_CHANGE, math.log(seconds) - expected))
        self._reading.add(rows, pairs, seconds)
        self._costs, self._prompts_seen = None, True
        # What the three have followed of the change by themselves is no change of speed any more.
        self._speed = expected + SPEED_GAIN * error - self._log_of(rows, pairs)

    def _log_of(self, rows: int, pairs: int) -> float:
        base, row, pair = self._learned()
        return math.log(base + row * rows + pair * pairs)

    def seconds(self, start: int, rows: int) -> float:
        """Predict the seconds that `rows` rows from position `start` on add to a pass."""
        _, row, pair = self._learned()
        return math.exp(self._speed) * (row * rows + pair * pairs_of(start, rows))

    def rows(self, start: int, most: int, seconds: float, beside: int) -> int:
        """Return how many of the `most` rows from position `start` on take at most `seconds`, beside `beside` other
        rows of the step; 0 if that is less than a grain."""
        if math.isinf(seconds):
            return most
        if not self._prompts_seen:
            return min(most, FIRST_ROWS)
        if seconds <= 0:
            return 0
        _, row, pair = self._learned()
        seconds *= math.exp(-self._speed)
        linear = row + pair * (start + 0.5)
        # The root of pair / 2 * rows^2 + linear * rows = seconds, in the form that a small `pair` does not upset.
        fitting = int(2 * seconds / (linear + math.sqrt(linear * linear + 2 * pair * seconds)))
        return most if fitting >= most else max(0, _aligned(fitting + beside) - beside)

    def _learned(self) -> tuple[float, float, float]:
        """The seconds of a pass's base, of a row and of a pair, by ridge regression towards the assumed proportions."""
        if self._costs is None:
            sums = self._decoding.values() + self._reading.values()
            products, features = sums[_PRODUCTS], sums[_FEATURES]
            # In units of the assumed costs, at the speed that fits best, all three are about 1.
            assumed = self._assumed
            speed = float(assumed @ features) / max(float(assumed @ products @ assumed), 1e-300)
            unit = assumed * speed
            ridge = PRIOR * np.eye(3)
            found = np.linalg.solve(products * np.outer(unit, unit) + ridge, features * unit + PRIOR)
            base, row, pair = np.maximum(found, LEAST_SHARE) * unit
            self._costs = float(base), float(row), float(pair)
        return self._costs


def pairs_of(start: int, rows: int) -> int:
    """The keys that `rows` rows from position `start` on see, in all."""
    return rows * start + rows * (rows + 1) // 2


def _aligned(rows: int) -> int:
    """The largest size of a step up to `rows`."""
    if rows < CAPTURED[0]:
        return rows - rows % GRAIN
    return max([rows - rows % CAPTURED[-1], *(size for size in CAPTURED if size <= rows)])
