"""Memory that the engine's processes use, for metrics. Imports torch only for a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec
import psutil

INTERVAL_SECONDS = 5.0


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the engine process of one rank, in bytes."""

    rank: int
    resident: int
    """Physical memory."""
    gpu: int | None = None
    """Allocated on its GPU; None without one."""


class MemoryMeter:
    """Reads this process's memory, but not at every step: a reading takes some 20 microseconds."""

    def __init__(self, device: str, rank: int = 0, others: Callable[[], tuple[RankMemory, ...]] = lambda: ()) -> None:
        """`others` returns the last readings of ranks in other processes."""
        self._allocated: Callable[[], int] | None = None
        if device.startswith("cuda"):
            import torch

            self._allocated = partial(torch.cuda.memory_allocated, torch.device(device))
        self._rank = rank
        self._others = others
        self._process = psutil.Process()
        self._next = 0.0

    def read(self) -> RankMemory:
        """Read this process's memory."""
        gpu = None if self._allocated is None else self._allocated()
        return RankMemory(rank=self._rank, resident=self._process.memory_info().rss, gpu=gpu)

    def read_if_due(self) -> tuple[RankMemory, ...]:
        """As `read_all`, but () if the last reading is younger than INTERVAL_SECONDS."""
        now = time.monotonic()
        if now < self._next:
            return ()
        self._next = now + INTERVAL_SECONDS
        return self.read_all()

    def read_all(self) -> tuple[RankMemory, ...]:
        """Read this process's memory; the other ranks' last readings follow."""
        return (self.read(), *self._others())
