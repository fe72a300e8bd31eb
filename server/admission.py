"""Admission control: limits the sequences and the tokens in flight, refuses those at once that would wait for too long,
tells clients that are refused when to come back, and refuses requests once the server is stopping."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pilotfish.server.errors import queue_full, queue_too_long, stopping, tokens_full
from pilotfish.server.shares import Demand, equal_shares

LONGEST_WAIT = 60.0
"""Seconds after which a refused client is asked to come back at the latest; OpenAI's clients heed no longer waits."""
SHORTEST_WAIT = 0.1
SPREAD = 0.25
"""Share by which a wait varies at random, so that clients that were refused together do not come back together."""
RESERVED = 8
"""One of so many places in the queue is kept for those who have less than an equal share of them."""
_NEW = 0.2
"""Weight of the newest end in the running mean of the seconds between ends."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Whose requests they are: a tenant's, with its weight, and of one of its users."""

    tenant: str = ""
    user: str = ""
    weight: float = 1.0


ANYONE = Flow()


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be in flight, and for how many seconds (`wait`) a sequence may probably wait: the estimate is for an
    engine that runs `running` sequences at once, and shares these places fairly if `fair`."""

    sequences: int
    running: int = 0
    tokens: int = 0
    """Of prompts and answers, as long as these may become; 0: any number."""
    wait: float = math.inf
    fair: bool = True


@dataclass(slots=True)
class _Use:
    """What a user, or a tenant, has in flight."""

    sequences: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Tenant(_Use):
    weight: float = 1.0
    users: dict[str, _Use] = field(default_factory=dict)


class Admitted:
    """What a request has been admitted with; `at_once` is how many of its sequences may run at once."""

    def __init__(self, gate: Gate, flow: Flow, limits: Limits, at_once: int) -> None:
        self.at_once = at_once
        self._gate, self._flow, self._limits = gate, flow, limits
        self.tokens = 0

    def claim(self, tokens: int) -> None:
        """Count the tokens that the request may come to, until it ends. Raises ApiError 429 if they are too many."""
        self._gate.claim(self._flow, self._limits, tokens)
        self.tokens += tokens


class Gate:
    """Counts the sequences in flight: admitted, and not yet answered in full. `clock` gives seconds, `draw` numbers in
    [0, 1)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self.in_flight = 0
        self.tokens = 0
        """What the requests in flight may come to."""
        self.busy_since = 0.0
        """The time when `in_flight` last rose from 0."""
        self.closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._clock = clock
        self._draw = draw
        self._tenants: dict[str, _Tenant] = {}
        self._pace: float | None = None
        """Mean seconds from the end of a sequence to that of the next, while there are some; None before the first."""
        self._spent, self._done = 0.0, 0.0
        """Seconds of the last ends, and tokens that their requests had claimed; the older ones fading."""
        self._last_end = 0.0
        self._promised = 0.0
        """The time at which the last of the refused clients was asked to come back."""

    @contextmanager
    def admit(self, count: int, limits: Limits, flow: Flow = ANYONE) -> Iterator[Admitted]:
        """Admit `count` sequences for the duration of the block, or as many of them as there is room for if `count`
        alone exceeds the limit. Raises ApiError 429 if there is no room, or if they would probably wait for too long;
        503 if the gate is closed.
        """
        if self.closed:
            raise stopping()
        limit = limits.sequences
        room = limit - self.in_flight
        if count <= limit and not self._equal(flow, count, limits, "sequences"):
            room -= max(0, limit - limits.running) // RESERVED if limits.running else 0
        admitted = count if count <= limit else room
        if admitted > room or admitted < 1:
            raise queue_full(self.in_flight, limit, self._retry_after(min(count, limit) - room))
        if limits.wait < math.inf and (wait := self.estimate(flow, limits)) > limits.wait:
            raise queue_too_long(wait, limits.wait, self._spread(wait - limits.wait))
        if self.in_flight == 0:
            self.busy_since = self._clock()
        self._count(flow, admitted, 0)
        self._idle.clear()
        admission = Admitted(self, flow, limits, admitted)
        try:
            yield admission
        finally:
            self._count(flow, -admitted, -admission.tokens)
            self._measure(admitted, admission.tokens)
            if self.in_flight == 0:
                self._idle.set()

    def claim(self, flow: Flow, limits: Limits, tokens: int) -> None:
        """See `Admitted.claim`. A request that is alone may have any number."""
        limit = limits.tokens
        if limit and self.tokens:
            room = limit - self.tokens
            if not self._equal(flow, tokens, limits, "tokens"):
                room -= limit // RESERVED
            if tokens > room:
                raise tokens_full(self.tokens, tokens, limit, self._retry_after(1))
        self._count(flow, 0, tokens)

    def estimate(self, flow: Flow, limits: Limits) -> float:
        """Return the seconds that one more sequence would probably wait before it runs."""
        if not limits.running or self.in_flight < limits.running or not self._done:
            return 0.0
        tenant = self._tenants.get(flow.tenant, _Tenant())
        own, places = _Use(self.in_flight, self.tokens), float(limits.running)
        if limits.fair:
            own = tenant.users.get(flow.user, _Use())
            tenants = {name: Demand(each.weight, each.sequences) for name, each in self._tenants.items()}
            tenants[flow.tenant] = Demand(flow.weight, tenant.sequences + 1)
            users = {name: Demand(1.0, each.sequences) for name, each in tenant.users.items()}
            users[flow.user] = Demand(1.0, own.sequences + 1)
            places = equal_shares(equal_shares(places, tenants)[flow.tenant], users)[flow.user]
        ahead = own.sequences + 1 - places
        if ahead <= 0 or not own.sequences:
            return 0.0
        tokens = own.tokens / own.sequences * ahead
        return tokens * self._spent / self._done * limits.running / places

    def _equal(self, flow: Flow, more: int, limits: Limits, what: str) -> bool:
        """Whether a tenant, or its user if it is the only one, has at most an equal share with `more` in flight."""
        limit = getattr(limits, what)
        tenant = self._tenants.get(flow.tenant)
        others: list[_Tenant] = [each for name, each in self._tenants.items() if name != flow.tenant]
        if others:
            weights = sum(each.weight for each in others) + flow.weight
            own = 0 if tenant is None else getattr(tenant, what)
            return bool(own + more <= limit * flow.weight / weights)
        users = {} if tenant is None else tenant.users
        if not users.keys() - {flow.user}:
            return False
        own = getattr(users.get(flow.user, _Use()), what)
        return bool(own + more <= limit / len(users.keys() | {flow.user}))

    def _count(self, flow: Flow, sequences: int, tokens: int) -> None:
        tenant = self._tenants.setdefault(flow.tenant, _Tenant())
        tenant.weight = flow.weight
        user = tenant.users.setdefault(flow.user, _Use())
        for use in (tenant, user):
            use.sequences += sequences
            use.tokens += tokens
        self.in_flight += sequences
        self.tokens += tokens
        if not user.sequences:
            del tenant.users[flow.user]
        if not tenant.sequences:
            del self._tenants[flow.tenant]

    def _measure(self, ended: int, tokens: int) -> None:
        now = self._clock()
        seconds = now - max(self._last_end, self.busy_since)
        self._pace = seconds / ended if self._pace is None else self._pace + _NEW * (seconds / ended - self._pace)
        self._last_end = now
        self._spent += _NEW * (seconds - self._spent)
        self._done += _NEW * (tokens - self._done)

    def _retry_after(self, missing: int) -> float:
        """Return the seconds until there is probably room for `missing` more sequences, behind all clients that were
        refused before and have yet to come back."""
        now = self._clock()
        pace = max(1.0, now - self.busy_since) / max(1, self.in_flight) if self._pace is None else self._pace
        self._promised = min(max(self._promised, now) + pace * max(1, missing), now + LONGEST_WAIT / (1 + SPREAD))
        return self._spread(self._promised - now)

    def _spread(self, seconds: float) -> float:
        jitter = 1 + SPREAD * (2 * self._draw() - 1)
        return max(SHORTEST_WAIT, min(seconds * jitter, LONGEST_WAIT))

    def close(self) -> None:
        self.closed = True

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is in flight. Returns False if that takes longer than `seconds`."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
