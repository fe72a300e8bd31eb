"""What a step costs, learned from the steps there were: seconds by token rows, and of a drafter by draft length."""

from __future__ import annotations

from bisect import bisect_left

WEIGHT = 0.1
"""Of a new measurement against what is known: about the last ten count."""
SPEED_WEIGHT, SHAPE_WEIGHT = 0.2, 0.05
"""The same for the machine's speed, which changes with whatever else it does, and for how steps of other rows compare,
which does not; a class that was measured a few times only gives way faster."""
OUTLIER = 2.0
"""A measurement counts for at most this multiple of what is known: a machine has other things to do now and then."""


class RowCost:
    """Seconds of a step by its token rows: lines between what was measured, never less for more rows.

    `calibrate` gives it a shape to start from. From then on each step corrects two things: how fast the machine is at
    present, whatever the rows, so that what was measured long ago stays comparable; and the shape at its own rows.
    Row counts are put together in classes an eighth apart.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured classes, ascending
        self._seconds: dict[int, float] = {}
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}  # the observation that a class last had
        self._observed = 0
        self._speed = 1.0

    @property
    def known(self) -> bool:
        return bool(self._rows)

    def calibrate(self, measured: dict[int, float]) -> None:
        """Start from these seconds by rows."""
        for rows, seconds in measured.items():
            self._set(_class(rows), seconds)

    def observe(self, rows: int, seconds: float) -> None:
        if self._rows:
            ratio = seconds / self.predict(rows)
            seconds *= min(OUTLIER, ratio) / ratio
            self._speed *= 1 + SPEED_WEIGHT * (min(OUTLIER, ratio) - 1)
        place, shape = _class(rows), seconds / self._speed
        known = self._seconds.get(place, shape)
        self._set(place, known + max(SHAPE_WEIGHT, 0.5 / (self._count.get(place, 0) + 1)) * (shape - known))
        self._observed += 1
        self._last[place] = self._observed

    def age(self, rows: int) -> int:
        """How many steps ago one of so many rows was measured, or since the start if there was none."""
        return self._observed - self._last.get(_class(rows), 0)

    def predict(self, rows: int) -> float:
        """Seconds; 0 before anything was measured."""
        if not self._rows:
            return 0.0
        i = bisect_left(self._rows, rows)
        if i == len(self._rows):  # beyond the largest: as steep as over its second half
            most = self._rows[-1]
            half = bisect_left(self._rows, most / 2)
            rise = (self._floor(i - 1) - self._floor(half)) / max(1, most - self._rows[half])
            return self._speed * (self._floor(i - 1) + rise * (rows - most))
        high = self._floor(i)
        if i == 0 or self._rows[i] == rows:
            return self._speed * high
        low = self._floor(i - 1)
        share = (rows - self._rows[i - 1]) / (self._rows[i] - self._rows[i - 1])
        return self._speed * (low + share * (high - low))

    def _floor(self, i: int) -> float:
        """Seconds of a class, or of a larger one that took less: more rows never take less time."""
        return min(self._seconds[rows] for rows in self._rows[i:])

    def _set(self, place: int, seconds: float) -> None:
        if place not in self._seconds:
            self._rows.insert(bisect_left(self._rows, place), place)
        self._seconds[place] = seconds
        self._count[place] = self._count.get(place, 0) + 1


def _class(rows: int) -> int:
    """Exact up to 16 rows, then in steps of an eighth of the power of two below."""
    step = max(1, 1 << max(0, rows.bit_length() - 4))
    return rows // step * step


class DraftCost:
    """Seconds of drafting, as a line over the length: reading what is new, then so much for each drafted token."""

    def __init__(self) -> None:
        self._count = self._length = self._seconds = self._square = self._product = 0.0

    @property
    def known(self) -> bool:
        return self._count > 0

    def observe(self, length: int, seconds: float) -> None:
        if self.known:
            seconds = min(seconds, OUTLIER * max(self.predict(length), 1e-6))
        keep = 1 - WEIGHT
        self._count = keep * self._count + 1
        self._length = keep * self._length + length
        self._seconds = keep * self._seconds + seconds
        self._square = keep * self._square + length * length
        self._product = keep * self._product + length * seconds

    def predict(self, length: int) -> float:
        if not self.known:
            return 0.0
        mean, seconds = self._length / self._count, self._seconds / self._count
        variance = self._square / self._count - mean * mean
        if variance < 1e-3:  # one length only: all of it in proportion
            return seconds * length / max(mean, 1.0)
        slope = max(0.0, (self._product / self._count - mean * seconds) / variance)
        return max(0.0, seconds + slope * (length - mean))
