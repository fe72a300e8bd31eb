"""What is done to find out: drafts that would not pay as far as is known, new drafters, and steps without drafts; and
when a drafter is not even thought about. Each answers a question that the controller asks in mid-choice. How rarely,
and at what expense altogether, is `trials`'."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from pilotfish.engine.speculation.control.acceptance import Acceptance
from pilotfish.engine.speculation.control.candidates import Candidate, UpcomingStep
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.forecast import Forecast
from pilotfish.engine.speculation.control.plans import GAIN, Ask, DraftPlan, DraftPlanner
from pilotfish.engine.speculation.control.trials import Trials

SURE = 2.0
"""A comparison of costs may be off by so many of its standard deviations."""
PLAIN_EVERY = 64
"""Steps after which a plain one is due where drafting is ahead of it by less than that."""
MOST_LIKELY = 0.95
"""Acceptance that a drafter could have at best. One that would not pay even so is not tried."""
TRIED = 2
"""Most tokens of a trial."""
REST, NEARLY = 7, 0.97
"""Steps in which a drafter is not thought about whose goodput alone is less than so much of plain decoding's."""
SEEN = 16
"""First tokens of a drafter after which its acceptance is known, and not its prior."""
_ROWS = ""
"""What is tried where the doubt is in what rows cost, and not in a drafter."""


class Exploration:
    """`load` is `UpcomingStep.load`."""

    def __init__(
        self,
        acceptance: Acceptance,
        forecast: Forecast,
        planner: DraftPlanner,
        target: RowCost,
        drafting: Mapping[str, RowCost],
    ) -> None:
        self._acceptance, self._forecast, self._planner = acceptance, forecast, planner
        self._target, self._drafting = target, drafting
        self._trials = Trials()
        self._resting: dict[tuple[str, int], int] = {}  # steps, by drafter and load
        self._hoping: dict[tuple[str, int], int] = {}  # the same
        self._longest = acceptance.longest

    def passed(self, seconds: float) -> None:
        """A step's pass took so long."""
        self._trials.earn(seconds)

    def drafted(self, name: str, seconds: float) -> None:
        """A model-based drafter took so long."""
        if self.is_new(name):
            self._trials.advanced(seconds)

    def agreed(self, candidate: Candidate, tokens: Seq[int], token_seconds: float) -> None:
        """The tokens that came at a candidate's positions, of which plain decoding takes `token_seconds` each. To be
        told before acceptance is."""
        for draft in candidate.drafts:
            if draft.drafter in candidate.asked and self.is_new(draft.drafter):
                self._trials.advanced(-token_seconds * _agreed(draft.tokens, tokens[:-1]))

    def is_new(self, name: str) -> bool:
        """Whether little more is known of a drafter than its prior."""
        return self._acceptance.trials(name) < SEEN

    def won(self, name: str, load: int) -> None:
        """The drafter pays without a trial."""
        self._trials.won((name, load))

    def rests(self, name: str, load: int) -> bool:
        """Whether a drafter that would not pay a few steps ago is not even thought about in this one."""
        left = self._resting.get((name, load), 0)
        if left:
            self._resting[name, load] = left - 1
            self._trials.wait((name, load))
        return left > 0

    def rest_unless_hopeful(
        self, step: UpcomingStep, name: str, load: int, plans: Mapping[str, DraftPlan | None] | None
    ) -> None:
        """Let a drafter rest that would not be asked if there were no other drafts either: those come and go with every
        token. `plans`: with those drafters, if there are none, that are nearly worth it. That one is hopeful holds for
        some steps, too."""
        if left := self._hoping.get((name, load), 0):
            self._hoping[name, load] = left - 1
            return
        plain = self._forecast.plain_goodput(step)
        plan = self._planner.alone(step, plain, name, NEARLY) if plans is None else plans.get(name)
        hopeful = plan is not None and plan.goodput > NEARLY * plain
        (self._hoping if hopeful else self._resting)[name, load] = REST

    def advance(self, step: UpcomingStep, name: str, ask: Ask) -> Ask | None:
        """As much of what is wanted of a new drafter as it may cost: first those candidates that it has least to read
        of, and at most one more than were seen of it, since its cost may differ from what it seemed."""
        budget, length = self._budget(step), ask.length
        wanted = sorted(ask.candidates, key=lambda i: step.candidates[i].backlog[name])
        most, count = min(len(wanted), 1 + int(self._acceptance.trials(name))), 0
        asking_seconds = self._forecast.asking_seconds
        if asking_seconds(step, name, wanted[:1], length) > budget:
            length = min(TRIED, length)
        while count < most and asking_seconds(step, name, wanted[: count + 1], length) <= budget:
            count += 1
        return Ask(sorted(wanted[:count]), length) if count else None

    def trial(self, step: UpcomingStep, best: DraftPlan, name: str, load: int) -> Ask | None:
        """A trial of a drafter that does not pay, as far as is known, if one is due."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return None
        if not self._trials.due((name, load)):
            return None
        may = [i for i, candidate in enumerate(step.candidates) if name in candidate.backlog]
        candidates = [i for i in may if step.candidates[i].backlog[name] <= self._longest + 1] or may[:1]
        length = min(TRIED, self._longest)
        loss = self._forecast.asking_seconds(step, name, candidates, length)
        if not self._trials.affordable(loss) or (self.is_new(name) and loss > self._budget(step)):
            return None
        # Where the drafter may pay as far as is known, and too little is, trials go on; else they get rarer.
        likely = self._planner.would_pay(step, best, name, may, self._acceptance.at_best(name))
        possible = likely or self._planner.would_pay(step, best, name, may, [MOST_LIKELY] * self._longest)
        self._trials.done((name, load), loss if possible else 0.0, rarer=not likely)
        return Ask(candidates, length) if possible else None

    def lengthened(self, best: DraftPlan, name: str, load: int) -> int:
        """The length to ask for: now and then one more than pays as far as is known, since nothing more will be
        known of positions that are not drafted for."""
        candidates, length = best.asks[name]
        if length >= self._longest:
            return length
        subject = (f"{name} {length + 1}", load)
        if not self._trials.due(subject):
            return length
        loss = self._drafting[name].predict(len(candidates))
        if not self._trials.affordable(loss):
            return length
        last = sum(best.chances[i][length - 1] for i in candidates if len(best.chances[i]) >= length)
        possible = last * self._acceptance.at_best(name)[length] > best.goodput * loss
        self._trials.done(subject, loss if possible else 0.0, rarer=True)
        return length + int(possible)

    def pays(self, step: UpcomingStep, gain: float, count: int, plain_seconds: float) -> bool:
        """Whether drafting is chosen that promises `gain` times plain decoding's goodput with `count` rows more."""
        subject = (_ROWS, step.load)
        old = self._target.age(step.rows) > PLAIN_EVERY
        if gain >= GAIN:
            self._trials.won(subject)
            return not old or gain > 1 + SURE * self._target.uncertainty(step.rows, step.rows + count, step.context)
        loss = max(0.0, 1 - gain) * plain_seconds
        if not self._trials.due(subject) or not self._trials.affordable(loss):
            return False
        possible = gain * (1 + SURE * self._target.uncertainty(step.rows, step.rows + count, step.context)) >= GAIN
        self._trials.done(subject, loss if possible else 0.0, rarer=True)
        return possible

    def _budget(self, step: UpcomingStep) -> float:
        """Seconds that new drafters may cost in this step."""
        return self._trials.advance(self._forecast.seconds(step, 0)[0])


def _agreed(drafted: Seq[int], tokens: Seq[int]) -> int:
    """How many of the drafted tokens came."""
    return next(
        (i for i, (one, other) in enumerate(zip(drafted, tokens, strict=False)) if one != other),
        min(len(drafted), len(tokens)),
    )
