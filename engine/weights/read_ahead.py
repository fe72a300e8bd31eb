"""Runs jobs in a few threads ahead of the consumer of their results."""

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
    """Bytes that its result takes until it is consumed."""


def read_ahead(jobs: Iterable[Job[T]], threads: int, limit: int) -> Generator[T, None, None]:
    """Yield the jobs' results in order. Those that wait and the one yielded last take at most `limit` bytes together,
    or one waits beside the last. Raises what a job raises."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    ahead = last = 0  # bytes of those that wait, and of the one yielded last, which the consumer still has
    with ThreadPoolExecutor(threads, "weights") as pool:
        try:
            for job in jobs:
                while waiting and last + ahead + job.size > limit:
                    last, future = waiting.popleft()
                    ahead -= last
                    yield future.result()
                    del future  # the result is the consumer's alone
                waiting.append((job.size, pool.submit(job.run)))
                ahead += job.size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
