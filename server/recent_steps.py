"""What the engine did in the last seconds, for /v1/loads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pilotfish.engine.stats import StepStats

SECONDS = 10
"""How far back it goes."""


@dataclass(slots=True)
class Rates:
    """Sums over some seconds."""

    second: int = 0
    """The first of them, of the clock."""
    generated: int = 0
    queried: int = 0
    hit: int = 0
    """Prompt tokens that were looked up in the prefix cache, and found."""
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def cache_hit_rate(self) -> float:
        return self.hit / self.queried if self.queried else 0.0

    @property
    def accept_length(self) -> float:
        """Mean tokens that a verified draft yields: the accepted ones and one more; 0 without drafts."""
        return 1 + self.accepted / self.drafts if self.drafts else 0.0

    @property
    def accept_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class RecentSteps:
    """Adds up steps by the second in which they ended. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds: deque[Rates] = deque()

    def step(self, stats: StepStats) -> None:
        now = int(self._clock())
        if not self._seconds or self._seconds[-1].second != now:
            self._seconds.append(Rates(now))
            self._forget()
        last = self._seconds[-1]
        last.generated += stats.generated_tokens
        last.queried += stats.prefix_queried_tokens
        last.hit += stats.prefix_hit_tokens
        last.drafts += sum([counts[0] for counts in stats.drafted_at.values() if counts])
        last.drafted += sum(stats.drafted.values())
        last.accepted += sum(stats.accepted.values())

    def sums(self) -> Rates:
        """Return the sums over the last SECONDS."""
        self._forget()
        total = Rates()
        for each in self._seconds:
            for name in ("generated", "queried", "hit", "drafts", "drafted", "accepted"):
                setattr(total, name, getattr(total, name) + getattr(each, name))
        return total

    def tokens_per_second(self) -> float:
        """Return the tokens that were generated a second in the last SECONDS, or since the start if that is later."""
        now = self._clock()
        covered = min(now - self._began, SECONDS + now % 1)
        return self.sums().generated / max(1.0, covered)

    def _forget(self) -> None:
        oldest = int(self._clock()) - SECONDS
        while self._seconds and self._seconds[0].second < oldest:
            self._seconds.popleft()
