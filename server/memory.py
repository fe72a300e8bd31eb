"""What large requests have used of the process's memory is found and given back when nobody waits for it.

Python's garbage collector stops every thread while it looks at all objects, which takes 100 ms if conversations of
7,000 messages are among them; and glibc keeps freed memory for threads that may want it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

YOUNG = 2000
"""New objects that the collector looks at at a time; at every tenth time, at those of all ten."""
NEVER = 2**31 - 1
TRIM_SECONDS = 1.0
COLLECT_SECONDS = 30.0


class Reclaimer:
    """Gives memory back a second after large requests. For a loop that uses it as a context, it also takes over the
    collections of the oldest generation: each `COLLECT_SECONDS`, and not in the middle of a large request."""

    def __init__(self) -> None:
        self._large = 0
        self._skipped = False
        self._trim = _malloc_trim()
        self._trim_due: asyncio.TimerHandle | None = None
        self._collecting = False

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Take over the collections meanwhile. What is loaded now is not looked at by any."""
        thresholds = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG, thresholds[1], NEVER)
        self._collecting = True
        timer = asyncio.get_running_loop().create_task(self._collect_now_and_then())
        try:
            yield
        finally:
            timer.cancel()
            self._collecting = False
            gc.set_threshold(*thresholds)
            gc.unfreeze()

    @contextlib.contextmanager
    def large(self) -> Iterator[None]:
        """A large request is in flight meanwhile."""
        self._large += 1
        try:
            yield
        finally:
            self._large -= 1
            if self._trim_due is None:
                self._trim_due = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._give_back)

    def close(self) -> None:
        if self._trim_due is not None:
            self._trim_due.cancel()

    async def _collect_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            self._skipped = self._large > 0 and not self._skipped  # not for as long as large requests keep coming
            if not self._skipped:
                gc.collect()

    def _give_back(self) -> None:
        self._trim_due = None
        if self._collecting and not self._large:
            gc.collect()
        if self._trim is not None:  # it lets other threads run, but takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, self._trim, 0)


def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, which no other C library has."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return found
