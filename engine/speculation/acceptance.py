"""How often drafts are right: by drafter, strength of evidence and position over all sequences, and a factor for each
sequence. What was drafted but not verified counts, too, as soon as the tokens at its places are known."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.speculation.drafter import Draft

PRIOR = 0.5
"""Acceptance assumed of a drafter that was never seen, at every position."""
PRIOR_WEIGHT = 4.0
MEMORY = 300.0
"""Trials of a position that count; older ones fade."""
OWN_WEIGHT = 12.0
"""Trials after which a sequence's own experience counts as much as everybody's."""
OWN_MEMORY = 50.0
MOST = 0.98


@dataclass(slots=True)
class _Rate:
    tried: float = 0.0
    accepted: float = 0.0

    def add(self, accepted: bool, memory: float) -> None:
        fade = 1 - 1 / memory
        self.tried = self.tried * fade + 1
        self.accepted = self.accepted * fade + accepted


@dataclass(slots=True)
class _Own:
    """A sequence's trials against what was expected of them."""

    expected: float = 0.0
    accepted: float = 0.0

    @property
    def factor(self) -> float:
        return (self.accepted + OWN_WEIGHT * 0.5) / (self.expected + OWN_WEIGHT * 0.5)


class Acceptance:
    def __init__(self) -> None:
        self._rates: dict[tuple[str, int, int], _Rate] = defaultdict(_Rate)
        # A sequence's first drafted token, and those behind an accepted one: two experiences
        self._own: dict[tuple[str, str, int], _Own] = defaultdict(_Own)

    def survival(self, sequence_id: str, drafter: str, evidence: int, length: int) -> list[float]:
        """Probability that the first 1, 2, ... `length` tokens of a draft are all accepted: not increasing."""
        owns = [self._own.get((sequence_id, drafter, later)) for later in (0, 1)]
        factors = [1.0 if own is None else own.factor for own in owns]
        alive, chances = 1.0, []
        for position in range(length):
            alive *= min(MOST, factors[position > 0] * self._rate(drafter, evidence, position))
            chances.append(alive)
        return chances

    def observe(self, sequence_id: str, drafter: str, draft: Draft, tokens: list[int]) -> None:
        """The tokens that followed, verified against or not: compared up to the first that differs."""
        for position, (drafted, token) in enumerate(zip(draft.tokens, tokens, strict=False)):
            right = drafted == token
            own = self._own[sequence_id, drafter, int(position > 0)]
            fade = 1 - 1 / OWN_MEMORY
            own.expected = own.expected * fade + self._rate(drafter, draft.evidence, position)
            own.accepted = own.accepted * fade + right
            self._rates[drafter, draft.evidence, position].add(right, MEMORY)
            if not right:
                return

    def release(self, sequence_id: str) -> None:
        for key in [key for key in self._own if key[0] == sequence_id]:
            del self._own[key]

    def _rate(self, drafter: str, evidence: int, position: int) -> float:
        """A position that was never reached is taken to be like the one before it."""
        prior = PRIOR
        for place in range(position + 1):
            rate = self._rates.get((drafter, evidence, place))
            if rate is None:
                break
            prior = (rate.accepted + PRIOR_WEIGHT * prior) / (rate.tried + PRIOR_WEIGHT)
        return prior
