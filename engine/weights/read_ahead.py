"""Results of jobs in their order, computed by a few threads ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    run: Callable[[], T]
    size: int
    """Bytes that its result takes while nobody has taken it."""


def read_ahead(jobs: Iterable[Job[T]], threads: int, limit: int) -> Generator[T, None, None]:
    """Results not taken yet have at most `limit` bytes together, or are of one job. Raises what a job raises."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    taken = 0
    with ThreadPoolExecutor(threads, "weights") as pool:
        try:
            for job in jobs:
                while waiting and taken + job.size > limit:
                    size, future = waiting.popleft()
                    yield future.result()
                    del future  # the result is its taker's alone
                    taken -= size
                waiting.append((job.size, pool.submit(job.run)))
                taken += job.size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
