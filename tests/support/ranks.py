"""Tensor-parallel ranks as threads of this process, for tests of what they compute. Processes are tested elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.decoder_model import DecoderModel
from tests.support.parity import DecoderRunner

T = TypeVar("T")


@dataclass
class Meeting:
    """Where ranks show each other a tensor. All come, look, and go together."""

    size: int
    shown: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.shown = [torch.empty(0)] * self.size


@dataclass
class ThreadCommunicator:
    """As gloo's: sums in the order of ranks."""

    rank: int
    size: int
    meeting: Meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self._all(x)
        total = first.clone()
        for other in rest:
            total += other
        self.meeting.barrier.wait()
        return total

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._all(x)
        assert len({part.shape for part in parts}) == 1, "parts must be of one shape"
        gathered = torch.cat(parts, dim=1) if self.rank == 0 else torch.full_like(x, torch.nan)
        self.meeting.barrier.wait()
        return gathered

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.shown[self.rank] = x
        self.meeting.barrier.wait()
        return list(self.meeting.shown)


class Ranks:
    """`size` threads, each with the communicator of its rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._meeting = Meeting(size)
        self._pool = ThreadPoolExecutor(size)

    def each(self, function: Callable[[Communicator], T]) -> list[T]:
        """What `function` returns on each rank, which it is given. Raises what the first one to fail has raised."""
        if self.size == 1:
            return [function(ALONE)]

        def run(rank: int) -> T:
            try:
                return function(ThreadCommunicator(rank, self.size, self._meeting))
            except BaseException:
                self._meeting.barrier.abort()
                raise

        futures = [self._pool.submit(run, rank) for rank in range(self.size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            self._meeting.barrier.reset()
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


class RankedRunner:
    """A model that is divided over ranks, and its cache: runs as a ModelRunner does."""

    def __init__(self, model: str, size: int, num_blocks: int, **settings: Any) -> None:
        self.ranks = Ranks(size)
        self.config = EngineConfig(**{"model": model, "dtype": "float32", "device": "cpu"} | settings)

        def make(comm: Communicator) -> tuple[DecoderRunner, Platform]:
            loaded, platform, _ = load_model(model, None, self.config, 0, lambda what, share: None, comm)
            block = platform.block_size
            caches = kv_cache.allocate(
                loaded.config, platform.attention, num_blocks, block, platform.cache_dtype, platform.device, size
            )
            for cache in caches:
                cache.keys.fill_(torch.nan)  # what was never written shows if it is read
                cache.values.fill_(torch.nan)
            return DecoderRunner(loaded, caches, block, platform.device), platform

        made = self.ranks.each(make)
        self.runners = [runner for runner, _ in made]
        self.platform = made[0][1]

    @property
    def model(self) -> DecoderModel:
        """Rank 0's."""
        return self.runners[0].model

    def run(self, spans: Any, tap: Any = None) -> torch.Tensor:
        def run(comm: Communicator) -> torch.Tensor:
            return self.runners[comm.rank].run(spans, tap if comm.rank == 0 else None)

        return self.ranks.each(run)[0]
