"""Whose turn it is: the order in which sequences run, where there are more of them than a step takes. No blocks, no
steps.

Under "fair" each tenant gets its share of the running sequences, by its weight, and within a tenant each user, whatever
the number of sequences that each has. Where shares are equal, those come first who were served fewer tokens, as in
Virtual Token Counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), and for a quantum those
who have just come, as in fq_codel (RFC 8290). `priority` orders the sequences of one tenant.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from pilotfish.engine.config import SchedulingPolicy
from pilotfish.engine.sequence import Sequence

QUANTUM = 256.0
"""Tokens by which one may be ahead of another before the other comes first: fewer would make them alternate."""
REMEMBERED = 4096
"""Tenants and users without sequences whose tokens are remembered."""


@dataclass(slots=True)
class _Flow:
    """What one tenant, or one user of a tenant, has been served."""

    weight: float = 1.0
    tokens: float = 0.0
    """Divided by the weight, and raised to what the others have been served while it had nothing to do."""
    sequences: int = 0


@dataclass(slots=True)
class _Flows:
    """The flows among which something is shared, by their names."""

    active: dict[str, _Flow] = field(default_factory=dict)
    idle: OrderedDict[str, _Flow] = field(default_factory=OrderedDict)

    def enter(self, name: str, weight: float) -> None:
        """Count a sequence of a flow."""
        flow = self.active.get(name)
        if flow is None:
            flow = self.idle.pop(name, None) or _Flow()
            others = [other.tokens for other in self.active.values()]
            if others:  # nobody saves up what it did not use, but who has just come is first for a quantum
                flow.tokens = max(flow.tokens, min(others) - QUANTUM)
            self.active[name] = flow
        flow.weight = weight
        flow.sequences += 1

    def leave(self, name: str) -> None:
        flow = self.active[name]
        flow.sequences -= 1
        if not flow.sequences:
            self.idle[name] = self.active.pop(name)
            if len(self.idle) > REMEMBERED:
                self.idle.popitem(last=False)

    def quanta(self, name: str) -> float:
        return self.active[name].tokens // QUANTUM


class Shares:
    """Orders sequences by `policy`: "fair" as above, "priority" by `priority` and then by arrival, "fcfs" by
    arrival."""

    def __init__(self, policy: SchedulingPolicy = "fair") -> None:
        self._policy = policy
        self._tenants = _Flows()
        self._users: dict[str, _Flows] = {}
        """By tenant, as long as it is active."""
        self._kinds: Counter[tuple[str, str, int]] = Counter()
        """Sequences by all that orders them besides their arrival."""
        self._arrived = 0

    @property
    def differ(self) -> bool:
        """Whether the order is another than that of arrival."""
        return len(self._kinds) > 1 and self._policy != "fcfs"

    def enter(self, sequence: Sequence) -> None:
        """Take in a sequence that has arrived."""
        self._arrived += 1
        sequence.number = sequence.place = self._arrived
        request = sequence.request
        self._kinds[request.tenant, request.user, request.priority] += 1
        self._tenants.enter(request.tenant, request.weight)
        self._users.setdefault(request.tenant, _Flows()).enter(request.user, 1.0)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        request = sequence.request
        kind = request.tenant, request.user, request.priority
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]
        self._users[request.tenant].leave(request.user)
        self._tenants.leave(request.tenant)
        if request.tenant not in self._tenants.active:
            del self._users[request.tenant]

    def served(self, sequence: Sequence, tokens: int) -> None:
        """Count tokens of a prompt that were computed, or of an answer."""
        tenant, user = sequence.request.tenant, sequence.request.user
        flow = self._tenants.active[tenant]
        flow.tokens += tokens / flow.weight
        self._users[tenant].active[user].tokens += tokens

    def order(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> list[Sequence]:
        """Return all sequences, those first whose turn it is; `place` becomes their place in this order."""
        rank = dict.fromkeys(running, 0) | dict.fromkeys(waiting, 1)
        ordered = self._fair(rank) if self.differ and self._policy == "fair" else sorted(rank, key=self._plain)
        for place, sequence in enumerate(ordered):
            sequence.place = place
        return ordered

    def _plain(self, sequence: Sequence) -> tuple[int, int]:
        return (sequence.request.priority if self._policy == "priority" else 0, sequence.number)

    def _fair(self, rank: dict[Sequence, int]) -> list[Sequence]:
        """`rank` is 1 for those that wait: of equals, those that run stay."""
        tenants: dict[str, list[Sequence]] = {}
        for sequence in rank:
            tenants.setdefault(sequence.request.tenant, []).append(sequence)
        keyed = []
        for tenant, own in tenants.items():
            weight, quanta = self._tenants.active[tenant].weight, self._tenants.quanta(tenant)
            for turn, sequence in enumerate(self._within(tenant, own, rank), start=1):
                sequence.turn = turn / weight
                keyed.append((sequence.turn, quanta, rank[sequence], sequence.number, sequence))
        keyed.sort(key=lambda entry: entry[:-1])
        return [sequence for *_, sequence in keyed]

    def _within(self, tenant: str, own: list[Sequence], rank: dict[Sequence, int]) -> list[Sequence]:
        """Order the sequences of a tenant."""
        own.sort(key=lambda sequence: (sequence.request.priority, sequence.number))
        users, turns = self._users[tenant], Counter[tuple[int, str]]()
        keyed = []
        for sequence in own:
            kind = sequence.request.priority, sequence.request.user
            turns[kind] += 1
            sequence.user_turn = turns[kind]
            quanta = users.quanta(sequence.request.user)
            keyed.append((kind[0], turns[kind], quanta, rank[sequence], sequence.number, sequence))
        keyed.sort(key=lambda entry: entry[:-1])
        return [sequence for *_, sequence in keyed]

    def may_displace(self, one: Sequence, other: Sequence) -> bool:
        """Return whether `other` is to give up its memory for `one`, and be computed anew: only where its tenant or its
        user then still has as much as that of `one`, or for a higher priority."""
        if self._policy == "fcfs":
            return False
        mine, theirs = one.request, other.request
        if self._policy == "priority" or mine.tenant == theirs.tenant:
            if mine.priority != theirs.priority:
                return mine.priority < theirs.priority
            fair = self._policy == "fair" and mine.user != theirs.user
            return fair and one.user_turn < other.user_turn
        return one.turn < other.turn
