"""How often drafts are right: by drafter, strength of evidence and position over all sequences, and a factor for each
sequence. What was drafted but not verified counts, too, as soon as the tokens at its positions are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pilotfish.engine.draft import Draft

PRIOR = 0.5
"""Acceptance assumed of a drafter that was never seen and says nothing of itself, at every position."""
PRIOR_WEIGHT = 4.0
"""In trials: of a drafter's prior, of its rate for a new class of evidence, of a position's for the next."""
MEMORY = 300.0
"""Trials of a position that count; older ones fade."""
OWN_WEIGHT = 3.0
"""Accepted tokens after which a sequence's own experience counts as much as everybody's."""
OWN_MEMORY = 50.0
MOST = 0.98
CONFIDENCES = 10
"""Classes of a drafter's own confidence."""

_Class = tuple[str, int]
_ANY = -1
"""The class of all of a drafter's drafts: what is known before there is evidence, and where a new class begins."""
_KEEP = 1 - 1 / MEMORY
_KEEP_OWN = 1 - 1 / OWN_MEMORY
_CONFIDENCE = 1000
"""The first class of confidence; those of evidence are below it."""


@dataclass(slots=True)
class _Rates:
    """A class's trials by position."""

    key: _Class
    tried: list[float]
    accepted: list[float]
    rates: list[float] = field(default_factory=list)
    """Acceptance by position, when it was last asked for."""
    stale: bool = False
    """Trials came in since."""

    def add(self, position: int, right: bool) -> None:
        self.tried[position] = self.tried[position] * _KEEP + 1
        self.accepted[position] = self.accepted[position] * _KEEP + right
        self.stale = True


@dataclass(slots=True)
class _Own:
    """A sequence's trials of a drafter against what was expected of them: of first tokens, and of those behind."""

    expected: list[float] = field(default_factory=lambda: [0.0, 0.0])
    accepted: list[float] = field(default_factory=lambda: [0.0, 0.0])
    factors: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """How much more often than others' they are right."""


_NEW = _Own()


@dataclass(slots=True)
class _Pending:
    """A draft that was right as far as is known, and how far that is."""

    draft: Draft
    known: int


class Acceptance:
    """`longest`: the most tokens of a draft. `priors`: what is assumed of a drafter's tokens until some were seen."""

    def __init__(self, longest: int = 8, priors: Mapping[str, float] | None = None) -> None:
        self.longest = longest
        self.priors = dict(priors or {})
        self._classes: dict[_Class, _Rates] = {}
        self._own: dict[str, dict[str, _Own]] = {}
        self._pending: dict[str, dict[str, _Pending]] = {}

    def expected(self, sequence_id: str, drafter: str) -> list[float]:
        """Before a drafter is asked: probability that it will have a first 1, 2, ... `longest` tokens and that all of
        them are accepted; not increasing."""
        return self._survival(sequence_id, drafter, self._current((drafter, _ANY)))

    def survival(self, sequence_id: str, draft: Draft) -> list[float]:
        """Probability that the first 1, 2, ... tokens of the draft are all accepted; not increasing."""
        if not draft.confidences:
            rates = self._current((draft.drafter, draft.evidence))[: len(draft.tokens)]
        else:
            rates = [self._current(_confidence(draft, i))[i] for i in range(len(draft.tokens))]
        return self._survival(sequence_id, draft.drafter, rates)

    def at_best(self, drafter: str) -> list[float]:
        """How often its tokens may be right behind right ones, by position, as far as trials do not speak against it:
        two standard deviations above what is known; `longest` of them."""
        rates = self._current((drafter, _ANY))
        tried = self._rates((drafter, _ANY)).tried
        return [
            min(MOST, rate + 2 * math.sqrt(rate * (1 - rate) / (trials + PRIOR_WEIGHT)))
            for rate, trials in zip(rates, tried, strict=True)
        ]

    def observe(self, sequence_id: str, drafts: Seq[Draft], tokens: Seq[int], asked: Mapping[str, int]) -> None:
        """The tokens that came next, and drafts that were made for them, verified against or not. `asked`: by drafter,
        the length that was asked for, where it may have stopped earlier of its own accord."""
        pending = self._pending.get(sequence_id)
        if pending:
            for drafter, item in list(pending.items()):
                if not self._go_on(sequence_id, item, tokens):
                    del pending[drafter]
        for draft in drafts:
            agreed = self._compare(sequence_id, draft, 0, tokens)
            if agreed == len(draft.tokens):
                if agreed < min(asked.get(draft.drafter, 0), self.longest):
                    # Whoever asks for so many does not get them.
                    self._rates((draft.drafter, _ANY)).add(agreed, False)
            elif agreed == len(tokens) and draft.drafter not in (pending or ()):
                pending = self._pending.setdefault(sequence_id, {})
                pending[draft.drafter] = _Pending(draft, agreed)

    def release(self, sequence_id: str) -> None:
        self._pending.pop(sequence_id, None)
        self._own.pop(sequence_id, None)

    def trials(self, drafter: str) -> float:
        """First tokens of the drafter that were seen to be right or wrong; old ones fade."""
        rates = self._classes.get((drafter, _ANY))
        return rates.tried[0] if rates else 0.0

    def _survival(self, sequence_id: str, drafter: str, rates: list[float]) -> list[float]:
        own = self._own.get(sequence_id)
        first, later = own.get(drafter, _NEW).factors if own else _NEW.factors
        alive, factor, chances = 1.0, first, []
        for rate in rates:
            alive *= min(MOST, factor * rate)
            chances.append(alive)
            factor = later
        return chances

    def _go_on(self, sequence_id: str, pending: _Pending, tokens: Seq[int]) -> bool:
        """Compare what is left of an earlier draft; whether there is more of it to compare."""
        agreed = self._compare(sequence_id, pending.draft, pending.known, tokens)
        pending.known += agreed
        return agreed == len(tokens) and pending.known < len(pending.draft.tokens)

    def _compare(self, sequence_id: str, draft: Draft, start: int, tokens: Seq[int]) -> int:
        """Count the draft's tokens from `start` on against those that came, up to the first that differs; returns how
        many agreed."""
        drafted, drafter = draft.tokens, draft.drafter
        every, rates = self._rates((drafter, _ANY)), self._rates((drafter, draft.evidence))
        own = self._own_of(sequence_id, drafter)
        for position, token in enumerate(tokens, start):
            if position == len(drafted):
                return position - start
            right = drafted[position] == token
            if draft.confidences:
                rates = self._rates(_confidence(draft, position))
            later = position > 0
            own.expected[later] = own.expected[later] * _KEEP_OWN + rates.rates[position]
            own.accepted[later] = own.accepted[later] * _KEEP_OWN + right
            own.factors[later] = (own.accepted[later] + OWN_WEIGHT) / (own.expected[later] + OWN_WEIGHT)
            rates.add(position, right)
            every.add(position, right)
            if not right:
                return position - start
        return len(tokens)

    def _own_of(self, sequence_id: str, drafter: str) -> _Own:
        owns = self._own.get(sequence_id)
        if owns is None:
            owns = self._own[sequence_id] = {}
        own = owns.get(drafter)
        if own is None:
            own = owns[drafter] = _Own()
        return own

    def _current(self, key: _Class) -> list[float]:
        """Acceptance by position, with all trials so far."""
        rates = self._rates(key)
        if rates.stale:
            self._resolve(rates)
        return rates.rates

    def _rates(self, key: _Class) -> _Rates:
        rates = self._classes.get(key)
        if rates is None:
            rates = self._classes[key] = _Rates(key, [0.0] * self.longest, [0.0] * self.longest)
            self._resolve(rates)
        return rates

    def _resolve(self, rates: _Rates) -> None:
        """A position that was hardly reached is taken to be like the one before it, the first like the drafter's."""
        drafter, kind = rates.key
        if kind >= _CONFIDENCE:
            rate = (kind - _CONFIDENCE + 0.5) / CONFIDENCES
        elif kind == _ANY:
            rate = self.priors.get(drafter, PRIOR)
        else:
            rate = self._current((drafter, _ANY))[0]
        line = []
        for tried, accepted in zip(rates.tried, rates.accepted, strict=True):
            rate = (accepted + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            line.append(rate)
        rates.rates, rates.stale = line, False


def _confidence(draft: Draft, position: int) -> _Class:
    return draft.drafter, _CONFIDENCE + min(CONFIDENCES - 1, int(draft.confidences[position] * CONFIDENCES))
