"""Schedule and budget of exploration: when something that does not pay is tried again, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_RETRY, LAST_RETRY, GROWTH = 16, 1024, 1.5
"""Steps until the first trial, maximum steps between two, and their growth with each trial without success."""
SHARE = 0.01
"""Share of all steps' time that trials may cost."""
SAVED = 64
"""Maximum steps' time that is saved up for trials."""
ADVANCE, ADVANCED_SHARE = 2.0, 0.01
"""Budget of new drafters beyond what they gain, however much they promise: in steps' time, plus a share of all time
since the start."""

Subject = tuple[str, int]
"""What is tried, and the load: the same draft can pay for one stream and not for sixteen."""


@dataclass(slots=True)
class _Schedule:
    wait: int = FIRST_RETRY
    waited: int = 0


@dataclass(slots=True)
class Trials:
    """Trials of a subject come at growing intervals, and all trials together cost at most `SHARE` of the time."""

    _schedules: dict[Subject, _Schedule] = field(default_factory=dict)
    _credit: float = 0.0
    """Seconds that may be spent."""
    _passed: float = 0.0
    """Seconds of all steps."""
    _advanced: float = 0.0
    """Seconds that new drafters took, less those that their tokens saved."""

    def earn(self, seconds: float) -> None:
        """Count the seconds of a step."""
        self._credit = min(self._credit + SHARE * seconds, SAVED * seconds)
        self._passed += seconds

    def advance(self, step: float) -> float:
        """Return the seconds that a new drafter may cost in this step, which takes `step` seconds without it."""
        return ADVANCE * step + ADVANCED_SHARE * self._passed - self._advanced

    def advanced(self, seconds: float) -> None:
        """Count seconds that a new drafter took or, if negative, saved."""
        self._advanced = max(0.0, self._advanced + seconds)

    def wait(self, subject: Subject) -> None:
        """Count a step without the subject."""
        self._schedules.setdefault(subject, _Schedule()).waited += 1

    def due(self, subject: Subject) -> bool:
        """Count a step without the subject, and return whether it is time to try it."""
        schedule = self._schedules.setdefault(subject, _Schedule())
        schedule.waited += 1
        return schedule.waited >= schedule.wait

    def affordable(self, loss: float) -> bool:
        """Return whether the budget allows a trial that costs `loss` seconds."""
        return loss <= self._credit

    def done(self, subject: Subject, loss: float, rarer: bool) -> None:
        """Record a trial in this step, or with no loss, that it would be no use. `rarer`: wait longer for the next."""
        schedule = self._schedules[subject]
        self._credit -= max(0.0, loss)
        schedule.waited = 0
        if rarer:
            schedule.wait = min(LAST_RETRY, round(GROWTH * schedule.wait))

    def won(self, subject: Subject) -> None:
        """Reset the subject's schedule, since it pays by itself now: should that end, the next trial comes soon."""
        self._schedules.pop(subject, None)
