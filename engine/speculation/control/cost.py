"""The cost of a model's passes, learned from observed passes: seconds by rows and context. No policy here.

An extended Kalman filter (Kalman 1960) on the logarithm of seconds. Its state has the machine's present speed, which
drifts with its other load; the curve over rows, which hardly drifts; and the cost of a token of context. So passes of
few and of many rows, some steps apart, tell how the two compare, while repeated passes of one size tell the machine's
speed, and the filter knows the uncertainty of a comparison.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np

NOISE = 0.06
"""Relative standard deviation of a measurement."""
SPEED_DRIFT, SHAPE_DRIFT = 0.02, 0.001
"""Relative standard deviations of the change in the machine's speed, and in each point of the shape, between two
observations."""
SHAPE_DOUBT, SHAPE_REACH = 0.25, 1.5
"""Relative standard deviation of the shape between calibrated points, and the octaves of rows over which correlation
between points falls by a factor of e."""
CALIBRATION_NOISE = 0.05
CONTEXT_DOUBT, CONTEXT_DRIFT = 0.5, 0.002
"""Relative standard deviations of a context token's calibrated cost, and of its change between observations."""
LEAST_CONTEXT = 1e-6
"""Minimum cost of a token of context, as a share of a pass: a logarithm of 0 could not be corrected."""
OUTLIER = 3.0
"""Standard deviations at which a measurement is clipped, since other processes disturb some."""
LEAST_TABLE = 32
"""Minimum rows of the table of predictions."""
KNOTS = 128
"""Rows that the curve has points for, unless it is calibrated for more; beyond them it is a line."""

_FIRST = 2
"""Index in the state of the curve's first point, after the logs of speed and of a context token's seconds."""


class RowCost:
    """Predicts a pass's seconds from its rows (piecewise linear, never less for more rows) and its context, the tokens
    in the KV cache of all its sequences.

    `calibrate` sets the initial shape, and `observe` corrects it.

    block: of a drafter that drafts all tokens in one pass, the rows that this takes for each sequence, whatever the
    draft's length; 0: a pass is for one token.
    """

    def __init__(self, block: int = 0) -> None:
        self.block = block
        self._rows: list[int] = []  # the curve's points, ascending
        # The log of speed; at speed 1, the logs of a context token's seconds and of those at each point.
        self._state = np.zeros(0)
        self._doubt = np.zeros((0, 0))  # covariance of the state
        self._diagonal = self._drift = np.zeros(0)  # a view of its diagonal, and what that grows by
        self._table: list[float] = []  # seconds of 0, 1, 2, ... rows without context; reset when the state changes
        self._token = 0.0  # seconds of a token of context, with `_table`
        self._observed = 0
        self._last: dict[int, int] = {}  # index of each point's last observation

    @property
    def known(self) -> bool:
        return bool(self._rows)

    def calibrate(self, measured: dict[int, float], context_token: float = 0.0) -> None:
        """Start from measured seconds by rows, without context, and from the seconds of a token of context."""
        rows = sorted(measured)
        logs = [math.log(measured[count]) for count in rows]
        self._begin(_points(max(KNOTS, rows[-1])), rows, logs, context_token)

    def observe(self, rows: int, seconds: float, context: int = 0, noise: float = NOISE) -> None:
        """Observe the seconds of a pass of `rows` rows over `context` tokens of context."""
        self.observe_passes((rows,), seconds, context, noise)

    def observe_passes(self, passes: Seq[int], seconds: float, context: int = 0, noise: float = NOISE) -> None:
        """Observe the total seconds of `passes`, the rows of each, over `context` tokens of context in all."""
        if not self._rows:
            self._begin(_points(max(KNOTS, *passes)), [passes[0]], [math.log(seconds / len(passes))], 0.0)
        entries, slopes, predicted = self._linear(passes, context)
        # A step's pass has emptied the caches, so that what counts is how little code this runs: few operations of few
        # kinds, rather than the library's products.
        doubt = self._doubt
        self._diagonal += self._drift
        reach = doubt[0] * slopes[0]
        for entry, slope in zip(entries[1:], slopes[1:], strict=True):
            reach += doubt[entry] * slope
        variance = sum([slope * reach.item(entry) for entry, slope in zip(entries, slopes, strict=True)]) + noise**2
        most = OUTLIER * math.sqrt(variance)
        error = min(most, max(-most, math.log(max(seconds, 1e-9) / predicted)))
        self._state += reach * (error / variance)
        doubt -= reach[:, None] * (reach * (1 / variance))
        self._table = []
        self._observed += 1
        for rows in passes:
            self._last[self._nearest(rows)] = self._observed

    def age(self, rows: int) -> int:
        """Return how many observations ago one was of about `rows` rows; all of them if none was."""
        return self._observed - self._last.get(self._nearest(rows), 0)

    def predict(self, rows: int, context: int = 0) -> float:
        """Return the seconds of a pass; 0 before anything was measured."""
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
        """Return the seconds of `first`, first + 1, ... `last` rows."""
        table = self._table_to(last)
        reading = self._token * context
        return [seconds + reading for seconds in table[first : last + 1]]

    def uncertainty(self, rows: int, others: int, context: int = 0) -> float:
        """Return the relative standard deviation of the ratio of passes of `rows` and of `others` rows."""
        entries, ours, _ = self._linear((rows,), context)
        more, theirs, _ = self._linear((others,), context)
        entries, slopes = [*entries, *more], np.array([*ours, *(-slope for slope in theirs)])
        return math.sqrt(max(0.0, float(slopes @ self._doubt[np.ix_(entries, entries)] @ slopes)))

    def _begin(self, points: list[int], rows: list[int], logs: list[float], context_token: float) -> None:
        """Interpolate between measured rows; beyond the largest, continue with the slope of its second half."""
        seconds = np.exp(logs)
        shape = np.interp(points, rows, seconds)
        half = bisect_left(rows, rows[-1] / 2)
        rise = max(0.0, float(seconds[-1] - seconds[half])) / max(1, rows[-1] - rows[half])
        shape += rise * np.maximum(0, np.array(points) - rows[-1])
        octaves = np.log2(points)
        doubt = SHAPE_DOUBT**2 * np.exp(-np.abs(octaves[:, None] - octaves) / SHAPE_REACH)
        for count in rows:  # condition on the measured points
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
        self._diagonal = self._doubt.reshape(-1)[:: len(self._state) + 1]
        self._drift = np.full(len(self._state), SHAPE_DRIFT**2)
        self._drift[:_FIRST] += SPEED_DRIFT**2, CONTEXT_DRIFT**2

    def _linear(self, passes: Seq[int], context: int) -> tuple[list[int], list[float], float]:
        """Return the state entries that the seconds depend on, the derivatives of their logarithm, and the seconds."""
        value = self._state.item
        parts: dict[int, float] = {1: context * math.exp(value(1))}
        for rows in passes:
            high = min(bisect_left(self._rows, rows), len(self._rows) - 1)
            low = max(0, high - 1)
            span = self._rows[high] - self._rows[low]
            share = 1.0 if not span else min(1.0, (rows - self._rows[low]) / span)
            for point, weight in ((low, 1 - share), (high, share)):
                if weight > 0:
                    part = weight * math.exp(value(_FIRST + point))
                    parts[_FIRST + point] = parts.get(_FIRST + point, 0.0) + part
        total = sum(parts.values())
        slopes = [1.0, *[part / total for part in parts.values()]]
        predicted = total * math.exp(value(0))
        if max(passes) > self._rows[-1]:  # they count as the last point, but take longer
            predicted = sum(self.predict(rows) for rows in passes) + parts[1] * math.exp(value(0))
        return [0, *parts], slopes, predicted

    def _nearest(self, rows: int) -> int:
        return bisect_left(self._rows, rows)

    def _table_to(self, last: int) -> list[float]:
        if len(self._table) <= last:
            speed = math.exp(self._state.item(0))
            self._token = math.exp(self._state.item(1)) * speed
            self._table = self._tabulate(max(last, LEAST_TABLE), speed)
        return self._table

    def _tabulate(self, last: int, speed: float) -> list[float]:
        """Return the seconds of 0, 1, ... `last` rows at this speed."""
        points = self._rows
        # More rows never take less time: a point above a later one is lowered to it.
        logs: list[float] = self._state.tolist()[: _FIRST - 1 : -1]
        shape = [speed * math.exp(least) for least in accumulate(logs, min)][::-1]
        table = shape[:1] * (points[0] + 1)
        for at in range(1, len(points)):
            if len(table) > last:
                return table
            low, count = shape[at - 1], points[at] - points[at - 1]
            if count == 1:
                table.append(shape[at])
                continue
            step = (shape[at] - low) / count
            table += [low + step * part for part in range(1, count + 1)]
        half = bisect_left(points, points[-1] / 2)
        rise = (shape[-1] - shape[half]) / max(1, points[-1] - points[half])
        table += [shape[-1] + rise * part for part in range(1, last - points[-1] + 1)]
        return table


def _points(last: int) -> list[int]:
    """Return every row count up to 16, then four an octave, up to at least `last`."""
    points, rows = list(range(1, 17)), 16
    while points[-1] < last:
        points += [rows + rows * part // 4 for part in range(1, 5)]
        rows *= 2
    return points


def _point(rows: int, points: list[int]) -> int:
    return points[min(bisect_left(points, rows), len(points) - 1)]
