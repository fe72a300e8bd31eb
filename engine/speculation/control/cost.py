"""What passes of a model cost, learned from the passes there were: seconds by token rows and context. No policy here.

A Kalman filter (Kalman 1960), extended to the logarithm of seconds. Its state is how fast the machine is at present,
which drifts with whatever else the machine does; the curve over rows, which hardly does; and what a token of context
adds, which every sequence of a pass has to read. So passes of few rows and of many, some steps apart, say how the two
compare, while the same pass again and again says how fast the machine is; and the filter knows how sure it is of a
comparison.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Seq

import numpy as np

NOISE = 0.06
"""Standard deviation of a measurement, relative, as all below."""
SPEED_DRIFT, SHAPE_DRIFT = 0.02, 0.001
"""By how much the machine's speed, and each point of the shape, may change from one observation to the next."""
SHAPE_DOUBT, SHAPE_REACH = 0.25, 1.5
"""How far the shape may be from the calibrated one between what was calibrated; points so many octaves of rows apart
have little to say about each other."""
CALIBRATION_NOISE = 0.05
CONTEXT_DOUBT, CONTEXT_DRIFT = 0.5, 0.002
"""How far a token of context may be from the calibrated one, and how it may change."""
LEAST_CONTEXT = 1e-6
"""Of a pass's seconds that a token of context is taken to cost at least: nothing could not be corrected."""
OUTLIER = 3.0
"""A measurement counts for at most so many standard deviations: a machine has other things to do now and then."""
LEAST_TABLE = 32
"""Rows that are tabulated at least, when anything is asked."""
KNOTS = 128
"""Rows that the curve has points for unless it is calibrated for more; beyond them it goes on as a line."""


_FIRST = 2
"""Where in the state the curve begins: behind the logs of speed and of a context token's seconds."""


class RowCost:
    """Seconds of a pass by its token rows, lines between points, never less for more rows; and by its context, the
    tokens in the KV cache of all its sequences.

    `calibrate` gives it a shape to start from, `observe` corrects it by what passes took.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []  # the curve's points, ascending
        self._state = np.zeros(
            0
        )  # log speed; at speed 1 the logs of a context token's seconds and of those at each point
        self._doubt = np.zeros((0, 0))  # covariance of the state
        self._table: list[float] = []  # seconds without context of 0, 1, 2, ... rows, while the state stands
        self._token = 0.0  # seconds of a token of context, as long
        self._observed = 0
        self._last: dict[int, int] = {}  # the observation that a point last had

    @property
    def known(self) -> bool:
        return bool(self._rows)

    def calibrate(self, measured: dict[int, float], context_token: float = 0.0) -> None:
        """Start from these seconds by rows, without context, and of a token of context."""
        rows = sorted(measured)
        logs = [math.log(measured[count]) for count in rows]
        self._begin(_points(max(KNOTS, rows[-1])), rows, logs, context_token)

    def observe(self, rows: int, seconds: float, context: int = 0, noise: float = NOISE) -> None:
        """A pass of so many rows and tokens of context took so long."""
        self.observe_passes((rows,), seconds, context, noise)

    def observe_passes(self, passes: Seq[int], seconds: float, context: int = 0, noise: float = NOISE) -> None:
        """Passes of so many rows each, and so many tokens of context in all of them, took so long together."""
        if not self._rows:
            self._begin(_points(max(KNOTS, *passes)), [passes[0]], [math.log(seconds / len(passes))], 0.0)
        entries, slopes, predicted = self._linear(passes, context)
        state, doubt = self._state, self._doubt
        diagonal = doubt.reshape(-1)[:: len(state) + 1]
        diagonal += SHAPE_DRIFT**2
        diagonal[0] += SPEED_DRIFT**2
        diagonal[1] += CONTEXT_DRIFT**2
        reach = doubt[:, entries] @ slopes
        variance = float(slopes @ reach[entries]) + noise**2
        most = OUTLIER * math.sqrt(variance)
        error = min(most, max(-most, math.log(max(seconds, 1e-9) / predicted)))
        state += reach * (error / variance)
        doubt -= np.outer(reach, reach / variance)
        self._table = []
        self._observed += 1
        for rows in passes:
            self._last[self._nearest(rows)] = self._observed

    def age(self, rows: int) -> int:
        """How many observations ago there was one of about so many rows, or since the start if there was none."""
        return self._observed - self._last.get(self._nearest(rows), 0)

    def predict(self, rows: int, context: int = 0) -> float:
        """Seconds; 0 before anything was measured."""
        if not self._rows:
            return 0.0
        return self._table_to(rows)[rows] + self._token * context

    @property
    def context_token(self) -> float:
        """Seconds that a token of context adds to a pass; 0 before anything was measured."""
        if not self._rows:
            return 0.0
        self._table_to(0)
        return self._token

    def seconds(self, first: int, last: int, context: int = 0) -> list[float]:
        """Seconds of `first`, first + 1, ... `last` rows."""
        table = self._table_to(last)
        reading = self._token * context
        return [seconds + reading for seconds in table[first : last + 1]]

    def uncertainty(self, rows: int, others: int, context: int = 0) -> float:
        """Standard deviation, relative, of how passes of `rows` and of `others` rows compare."""
        entries, slopes, _ = self._linear((rows,), context)
        more, other, _ = self._linear((others,), context)
        entries, slopes = [*entries, *more], np.concatenate([slopes, -other])
        return math.sqrt(max(0.0, float(slopes @ self._doubt[np.ix_(entries, entries)] @ slopes)))

    def _begin(self, points: list[int], rows: list[int], logs: list[float], context_token: float) -> None:
        """Lines between the measured; beyond the largest as steep as over its second half."""
        seconds = np.exp(logs)
        shape = np.interp(points, rows, seconds)
        half = bisect_left(rows, rows[-1] / 2)
        rise = max(0.0, float(seconds[-1] - seconds[half])) / max(1, rows[-1] - rows[half])
        shape += rise * np.maximum(0, np.array(points) - rows[-1])
        octaves = np.log2(points)
        doubt = SHAPE_DOUBT**2 * np.exp(-np.abs(octaves[:, None] - octaves) / SHAPE_REACH)
        for count in rows:  # what was measured is known better, and what is near it a little
            at = points.index(_point(count, points))
            reach = doubt[:, at].copy()
            doubt -= np.outer(reach, reach / (reach[at] + CALIBRATION_NOISE**2))
        self._rows, self._table = points, []
        token = max(context_token, float(seconds[0]) * LEAST_CONTEXT)
        self._state = np.concatenate([[0.0, math.log(token)], np.log(shape)])
        self._doubt = np.zeros((len(self._state), len(self._state)))
        self._doubt[0, 0] = NOISE**2
        self._doubt[1, 1] = CONTEXT_DOUBT**2
        self._doubt[_FIRST:, _FIRST:] = doubt

    def _linear(self, passes: Seq[int], context: int) -> tuple[list[int], np.ndarray, float]:
        """Which entries of the state seconds depend on, the derivatives of their logarithm, and the seconds."""
        parts: dict[int, float] = {1: context * math.exp(self._state[1])}
        for rows in passes:
            high = min(bisect_left(self._rows, rows), len(self._rows) - 1)
            low = max(0, high - 1)
            span = self._rows[high] - self._rows[low]
            share = 1.0 if not span else min(1.0, (rows - self._rows[low]) / span)
            for point, weight in ((low, 1 - share), (high, share)):
                if weight > 0:
                    parts[_FIRST + point] = parts.get(_FIRST + point, 0.0) + weight * math.exp(
                        self._state[_FIRST + point]
                    )
        total = sum(parts.values())
        slopes = np.array([1.0, *(part / total for part in parts.values())])
        predicted = total * math.exp(self._state[0])
        if max(passes) > self._rows[-1]:  # they count as the last point, but take longer
            predicted = sum(self.predict(rows) for rows in passes) + parts[1] * math.exp(self._state[0])
        return [0, *parts], slopes, predicted

    def _nearest(self, rows: int) -> int:
        return bisect_left(self._rows, rows)

    def _table_to(self, last: int) -> list[float]:
        if len(self._table) <= last:
            speed = math.exp(self._state[0])
            self._token = math.exp(self._state[1]) * speed
            self._table = self._tabulate(max(last, LEAST_TABLE), speed)
        return self._table

    def _tabulate(self, last: int, speed: float) -> list[float]:
        """Seconds at this speed of 0, 1, ... `last` rows."""
        points = self._rows
        # A class that took longer than a larger one did: more rows never take less time.
        shape: list[float] = (speed * np.minimum.accumulate(np.exp(self._state[: _FIRST - 1 : -1]))[::-1]).tolist()
        table = shape[:1] * (points[0] + 1)
        for at in range(1, len(points)):
            if len(table) > last:
                return table
            low, count = shape[at - 1], points[at] - points[at - 1]
            step = (shape[at] - low) / count
            table += [low + step * part for part in range(1, count + 1)]
        half = bisect_left(points, points[-1] / 2)
        rise = (shape[-1] - shape[half]) / max(1, points[-1] - points[half])
        table += [shape[-1] + rise * part for part in range(1, last - points[-1] + 1)]
        return table


def _points(last: int) -> list[int]:
    """Every row up to 16, then four an octave, up to `last` at least."""
    points, rows = list(range(1, 17)), 16
    while points[-1] < last:
        points += [rows + rows * part // 4 for part in range(1, 5)]
        rows *= 2
    return points


def _point(rows: int, points: list[int]) -> int:
    return points[min(bisect_left(points, rows), len(points) - 1)]
