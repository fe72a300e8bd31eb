"""Admission control: limits the sequences in flight, tells clients that are refused when to come back, and refuses
requests once the server is stopping."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pilotfish.server.errors import queue_full, stopping

LONGEST_WAIT = 60.0
"""Seconds after which a refused client is asked to come back at the latest; OpenAI's clients heed no longer waits."""
SHORTEST_WAIT = 0.1
SPREAD = 0.25
"""Share by which a wait varies at random, so that clients that were refused together do not come back together."""
_NEW = 0.2
"""Weight of the newest end in the running mean of the seconds between ends."""


class Gate:
    """Counts the sequences in flight: admitted, and not yet answered in full. `clock` gives seconds, `draw` numbers in
    [0, 1)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self.in_flight = 0
        self.busy_since = 0.0
        """The time when `in_flight` last rose from 0."""
        self.closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._clock = clock
        self._draw = draw
        self._pace: float | None = None
        """Mean seconds from the end of a sequence to that of the next, while there are some; None before the first."""
        self._last_end = 0.0
        self._promised = 0.0
        """The time at which the last of the refused clients was asked to come back."""

    @contextmanager
    def admit(self, count: int, limit: int) -> Iterator[int]:
        """Admit `count` sequences for the duration of the block, or as many of them as there is room for if `count`
        alone exceeds `limit`: yields their number, which is how many may run at once. Raises ApiError 429 if there is
        no room below `limit`, 503 if the gate is closed.
        """
        if self.closed:
            raise stopping()
        room = limit - self.in_flight
        admitted = count if count <= limit else room
        if admitted > room or admitted < 1:
            raise queue_full(self.in_flight, limit, self._retry_after(min(count, limit) - room))
        if self.in_flight == 0:
            self.busy_since = self._clock()
        self.in_flight += admitted
        self._idle.clear()
        try:
            yield admitted
        finally:
            self.in_flight -= admitted
            self._measure(admitted)
            if self.in_flight == 0:
                self._idle.set()

    def _measure(self, ended: int) -> None:
        now = self._clock()
        pace = (now - max(self._last_end, self.busy_since)) / ended
        self._pace = pace if self._pace is None else self._pace + _NEW * (pace - self._pace)
        self._last_end = now

    def _retry_after(self, missing: int) -> float:
        """Return the seconds until there is probably room for `missing` more sequences, behind all clients that were
        refused before and have yet to come back."""
        now = self._clock()
        pace = max(1.0, now - self.busy_since) / self.in_flight if self._pace is None else self._pace
        self._promised = min(max(self._promised, now) + pace * max(1, missing), now + LONGEST_WAIT / (1 + SPREAD))
        jitter = 1 + SPREAD * (2 * self._draw() - 1)
        return max(SHORTEST_WAIT, (self._promised - now) * jitter)

    def close(self) -> None:
        self.closed = True

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is in flight. Returns False if that takes longer than `seconds`."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
