"""How much memory an engine process takes, as metrics tell it. What is free for a KV cache is `engine.memory.free`."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from pilotfish.engine.request import RankMemory

INTERVAL_SECONDS = 5.0


class MemoryMeter:
    """Reads this process's memory, but not at every step: a reading takes some 20 microseconds."""

    def __init__(self, device: str, rank: int = 0, others: Callable[[], tuple[RankMemory, ...]] = lambda: ()) -> None:
        """`others` tells what is known of ranks in other processes."""
        self._gpu = torch.device(device) if device.startswith("cuda") else None
        self._rank = rank
        self._others = others
        self._process = psutil.Process()
        self._next = 0.0

    def read(self) -> RankMemory:
        """This process's."""
        gpu = None if self._gpu is None else torch.cuda.memory_allocated(self._gpu)
        return RankMemory(rank=self._rank, resident=self._process.memory_info().rss, gpu=gpu)

    def read_if_due(self) -> tuple[RankMemory, ...]:
        """A reading of every rank, or () where the last is younger than INTERVAL_SECONDS."""
        now = time.monotonic()
        if now < self._next:
            return ()
        self._next = now + INTERVAL_SECONDS
        return self.read_all()

    def read_all(self) -> tuple[RankMemory, ...]:
        """A reading of every rank."""
        return (self.read(), *self._others())
