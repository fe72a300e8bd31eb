"""Admission control: limits the sequences in flight, and refuses requests once the server is stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pilotfish.server.errors import bad_parameter, queue_full, stopping


class Gate:
    """Counts the sequences in flight: admitted, and not yet answered in full."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.busy_since = 0.0
        """time.monotonic() when `in_flight` last rose from 0."""
        self.closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(self, count: int, limit: int, param: str) -> Iterator[None]:
        """Admit `count` sequences for the duration of the block. Raises ApiError 429 if more than `limit` would be in
        flight, 503 if the gate is closed, 400 (for `param`) if `count` alone exceeds `limit`.
        """
        if self.closed:
            raise stopping()
        if count > limit:
            raise bad_parameter(
                param, f"the request asks for {count} answers, but this server takes at most {limit} sequences at once"
            )
        if self.in_flight + count > limit:
            raise queue_full(self.in_flight, limit)
        if self.in_flight == 0:
            self.busy_since = time.monotonic()
        self.in_flight += count
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= count
            if self.in_flight == 0:
                self._idle.set()

    def close(self) -> None:
        self.closed = True

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is in flight. Returns False if that takes longer than `seconds`."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
