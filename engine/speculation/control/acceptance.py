"""Acceptance rates: by drafter, class of evidence and position over all sequences, with a factor for each sequence.
Drafts that were not verified count, too, as soon as the tokens at their positions are known."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pilotfish.engine.draft import Draft

PRIOR = 0.5
"""Acceptance rate assumed of a drafter without a prior, at every position."""
PRIOR_WEIGHT = 4.0
"""Weight, in trials, of a drafter's prior, of its rate for a new class of evidence, and of a position's rate for the
next position."""
MEMORY = 300.0
"""Effective number of trials of a position; older ones decay."""
OWN_WEIGHT = 3.0
"""Expected tokens after which a sequence's own acceptance weighs as much as that of all sequences."""
OWN_MEMORY = 50.0
MOST = 0.98
CONFIDENCES = 10
"""Number of classes of a drafter's confidence."""

_Class = tuple[str, int]
_ANY = -1
"""The class of all of a drafter's drafts, from which a new class starts."""
_KEEP = 1 - 1 / MEMORY
_KEEP_OWN = 1 - 1 / OWN_MEMORY
_CONFIDENCE = 1000
"""The first class of confidence; classes of evidence are below it."""


@dataclass(slots=True)
class _Rates:
    """The trials of a class, by position."""

    key: _Class
    tried: list[float]
    accepted: list[float]
    rates: list[float] = field(default_factory=list)
    """Acceptance rates by position, as last computed."""
    stale: bool = False
    """Whether trials were added since."""

    def add(self, position: int, right: bool) -> None:
        self.tried[position] = self.tried[position] * _KEEP + 1
        self.accepted[position] = self.accepted[position] * _KEEP + right
        self.stale = True


@dataclass(slots=True)
class _Own:
    """A sequence's trials of a drafter, expected and accepted: of first tokens, and of later ones."""

    expected: list[float] = field(default_factory=lambda: [0.0, 0.0])
    accepted: list[float] = field(default_factory=lambda: [0.0, 0.0])
    factors: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Acceptance relative to that of all sequences."""


_NEW = _Own()


@dataclass(slots=True)
class _Pending:
    """A draft whose first `known` tokens were right, and whose others are still open."""

    draft: Draft
    known: int


class Acceptance:
    """`longest`: maximum tokens of a draft; `lengths`: by drafter, where it is another. `priors`: by drafter, the rate
    assumed until some tokens were observed."""

    def __init__(
        self,
        longest: int = 8,
        priors: Mapping[str, float] | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self.longest = longest
        self.priors = dict(priors or {})
        self._lengths = dict(lengths or {})
        self._classes: dict[_Class, _Rates] = {}
        self._own: defaultdict[str, defaultdict[str, _Own]] = defaultdict(lambda: defaultdict(_Own))
        self._pending: dict[str, dict[str, _Pending]] = {}

    def expected(self, sequence_id: str, drafter: str) -> list[float]:
        """Return the probability that a drafter, not yet asked, proposes 1, 2, ... `longest` tokens that are all
        accepted; not increasing."""
        return self._survival(sequence_id, drafter, self._current((drafter, _ANY)))

    def survival(self, sequence_id: str, draft: Draft) -> list[float]:
        """Return the probability that the first 1, 2, ... tokens of the draft are all accepted; not increasing."""
        if not (draft.confidences or draft.classes):
            rates = self._current((draft.drafter, draft.evidence))[: len(draft.tokens)]
        else:
            rates = [self._current(_class(draft, i))[i] for i in range(len(draft.tokens))]
        return self._survival(sequence_id, draft.drafter, rates)

    def at_best(self, drafter: str) -> list[float]:
        """Return optimistic acceptance rates by position, each given that the tokens before are right: two standard
        deviations above the estimates; `longest` of them."""
        rates = self._current((drafter, _ANY))
        tried = self._rates((drafter, _ANY)).tried
        return [
            min(MOST, rate + 2 * math.sqrt(rate * (1 - rate) / (trials + PRIOR_WEIGHT)))
            for rate, trials in zip(rates, tried, strict=True)
        ]

    def observe(self, sequence_id: str, drafts: Seq[Draft], tokens: Seq[int], asked: Mapping[str, int]) -> None:
        """Compare a sequence's next tokens with the drafts made for them, verified or not. `asked`: by drafter, the
        length that it was asked for, where it may have stopped earlier."""
        pending = self._pending.get(sequence_id)
        if pending:
            for drafter, item in list(pending.items()):
                if not self._go_on(sequence_id, item, tokens):
                    del pending[drafter]
        for draft in drafts:
            agreed = self._compare(sequence_id, draft, 0, tokens)
            if agreed == len(draft.tokens):
                if agreed < min(asked.get(draft.drafter, 0), self.longest):
                    # A longer draft was asked for, and its next token counts as not accepted.
                    self._rates((draft.drafter, _ANY)).add(agreed, False)
            elif agreed == len(tokens) and draft.drafter not in (pending or ()):
                pending = self._pending.setdefault(sequence_id, {})
                pending[draft.drafter] = _Pending(draft, agreed)

    def release(self, sequence_id: str) -> None:
        self._pending.pop(sequence_id, None)
        self._own.pop(sequence_id, None)

    def trials(self, drafter: str) -> float:
        """Return the number of the drafter's first tokens that were observed; old ones decay."""
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
        """Compare the rest of an earlier draft, and return whether some of it is still open."""
        agreed = self._compare(sequence_id, pending.draft, pending.known, tokens)
        pending.known += agreed
        return agreed == len(tokens) and pending.known < len(pending.draft.tokens)

    def _compare(self, sequence_id: str, draft: Draft, start: int, tokens: Seq[int]) -> int:
        """Count trials of the draft's tokens from `start` on, up to the first that differs from `tokens`. Returns how
        many agreed."""
        drafted, drafter = draft.tokens, draft.drafter
        every, rates = self._rates((drafter, _ANY)), self._rates((drafter, draft.evidence))
        own = self._own[sequence_id][drafter]
        for position, token in enumerate(tokens, start):
            if position == len(drafted):
                return position - start
            right = drafted[position] == token
            if draft.confidences or draft.classes:
                rates = self._rates(_class(draft, position))
            later = position > 0
            own.expected[later] = own.expected[later] * _KEEP_OWN + rates.rates[position]
            own.accepted[later] = own.accepted[later] * _KEEP_OWN + right
            own.factors[later] = (own.accepted[later] + OWN_WEIGHT) / (own.expected[later] + OWN_WEIGHT)
            rates.add(position, right)
            every.add(position, right)
            if not right:
                return position - start
        return len(tokens)

    def _current(self, key: _Class) -> list[float]:
        """Return the acceptance rates by position, with all trials so far."""
        rates = self._rates(key)
        if rates.stale:
            self._resolve(rates)
        return rates.rates

    def _rates(self, key: _Class) -> _Rates:
        rates = self._classes.get(key)
        if rates is None:
            length = self._lengths.get(key[0], self.longest)
            rates = self._classes[key] = _Rates(key, [0.0] * length, [0.0] * length)
            self._resolve(rates)
        return rates

    def _resolve(self, rates: _Rates) -> None:
        """Compute rates. A position with few trials is assumed to be like the one before, the first like the prior."""
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


def _class(draft: Draft, position: int) -> _Class:
    """The class of a token's own evidence."""
    if draft.classes:
        return draft.drafter, draft.classes[position]
    return draft.drafter, _CONFIDENCE + min(CONFIDENCES - 1, int(draft.confidences[position] * CONFIDENCES))
