"""Quotas: the limits of tenants that their API keys come with, and what each has used of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pilotfish.server.errors import over_limit
from pilotfish.server.tenants import NO_LIMITS, ApiKey, KeyLimits

MINUTE = 60.0


class _Bucket:
    """A token bucket (RFC 2697): holds at most what a minute allows, and may be overdrawn by a single request, since
    nobody knows before how long an answer is."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.level = self._size = per_minute
        self._filled = now

    def fill(self, per_minute: float, now: float) -> None:
        """Fill up what has run in since; the limit may have changed."""
        self.level += (now - self._filled) * per_minute / MINUTE + per_minute - self._size
        self._size, self._filled = per_minute, now
        self.level = min(self.level, per_minute)

    def wait(self, level: float) -> float:
        """Seconds until it holds so much."""
        return (level - self.level) * MINUTE / self._size


class _Use:
    """What a tenant has used."""

    def __init__(self, limits: KeyLimits, now: float) -> None:
        self.sequences = 0
        self.requests = _Bucket(limits.requests_per_minute, now)
        self.tokens = _Bucket(limits.tokens_per_minute, now)


class Quota:
    """What a request has been admitted with."""

    def __init__(self, use: _Use | None) -> None:
        self._use = use
        self._claimed = 0
        self.used = 0
        """Tokens of its prompts and answers, once it has ended."""

    def claim(self, tokens: int) -> None:
        """Take the tokens that the request may come to; what it does not use is given back at its end."""
        self._claimed += tokens
        if self._use is not None:
            self._use.tokens.level -= tokens

    def give_back(self) -> None:
        if self._use is not None:
            self._use.tokens.level += self._claimed - self.used


class Quotas:
    """`clock` gives seconds. Tenants are counted by their names, which are the operator's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def admit(self, key: ApiKey | None, sequences: int) -> Iterator[Quota]:
        """Admit a request with this key for the duration of the block. Raises ApiError 429 if its tenant has used up
        one of its limits."""
        if key is None or key.name is None or key.limits == NO_LIMITS:
            yield Quota(None)
            return
        limits, now = key.limits, self._clock()
        use = self._uses.setdefault(key.name, _Use(limits, now))
        use.requests.fill(limits.requests_per_minute, now)
        use.tokens.fill(limits.tokens_per_minute, now)
        most = limits.max_sequences
        if most and use.sequences + sequences > most and (use.sequences or sequences > most):
            raise over_limit("max_sequences", f"{use.sequences} of its {most} sequences are in flight", 1.0)
        if limits.requests_per_minute and use.requests.level < 1:
            said = f"it has sent {limits.requests_per_minute:g} requests in a minute"
            raise over_limit("requests_per_minute", said, use.requests.wait(1))
        if limits.tokens_per_minute and use.tokens.level <= 0:
            said = f"it has used {limits.tokens_per_minute:g} tokens in a minute"
            raise over_limit("tokens_per_minute", said, use.tokens.wait(1))
        use.requests.level -= 1
        use.sequences += sequences
        quota = Quota(use)
        try:
            yield quota
        finally:
            use.sequences -= sequences
            quota.give_back()
