"""When something that does not pay is tried again, and at what expense: exploration with a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_RETRY, LAST_RETRY, GROWTH = 16, 1024, 1.5
"""Steps until the first trial, and most steps between two; they grow so much with each trial that leads to nothing."""
SHARE = 0.01
"""Of all steps' time that trials may cost."""
SAVED = 64
"""Most steps' time that is saved up for trials."""
ADVANCE, ADVANCED_SHARE = 2.0, 0.01
"""What drafters that were hardly seen may cost beyond what they bring, however much they promise: so many steps' time,
and this share of all the time since the start."""

Subject = tuple[str, int]
"""What is tried, at which load: the same draft can pay for one stream and not for sixteen."""


@dataclass(slots=True)
class _Schedule:
    wait: int = FIRST_RETRY
    waited: int = 0


@dataclass(slots=True)
class Trials:
    """Trials of a subject come at growing intervals, and all of them together cost at most `SHARE` of the time."""

    _schedules: dict[Subject, _Schedule] = field(default_factory=dict)
    _credit: float = 0.0
    """Seconds that may be spent."""
    _passed: float = 0.0
    """Seconds of all steps."""
    _advanced: float = 0.0
    """Seconds that drafters took which were hardly seen, less those that their tokens saved."""

    def earn(self, seconds: float) -> None:
        """A step took so long."""
        self._credit = min(self._credit + SHARE * seconds, SAVED * seconds)
        self._passed += seconds

    def advance(self, step: float) -> float:
        """Seconds that a drafter may cost in this step, which takes `step` without it, if hardly more than its prior is
        known of it."""
        return ADVANCE * step + ADVANCED_SHARE * self._passed - self._advanced

    def advanced(self, seconds: float) -> None:
        """Such a drafter took so long or, if negative, saved so much."""
        self._advanced = max(0.0, self._advanced + seconds)

    def wait(self, subject: Subject) -> None:
        """One more step without the subject."""
        self._schedules.setdefault(subject, _Schedule()).waited += 1

    def due(self, subject: Subject) -> bool:
        """One more step without the subject: is it time to try it, if that is affordable?"""
        schedule = self._schedules.setdefault(subject, _Schedule())
        schedule.waited += 1
        return schedule.waited >= schedule.wait

    def affordable(self, loss: float) -> bool:
        """Whether something may be tried that costs so many seconds."""
        return loss <= self._credit

    def done(self, subject: Subject, loss: float, rarer: bool) -> None:
        """It is tried in this step (or, at no loss, it turned out that nothing can come of it). `rarer`: it is known
        well enough to wait longer for the next trial."""
        schedule = self._schedules[subject]
        self._credit -= max(0.0, loss)
        schedule.waited = 0
        if rarer:
            schedule.wait = min(LAST_RETRY, round(GROWTH * schedule.wait))

    def won(self, subject: Subject) -> None:
        """It pays by itself now: should that end, the first trial comes soon."""
        self._schedules.pop(subject, None)
