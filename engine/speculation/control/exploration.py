"""Exploration: what the controller does only to learn, such as drafts that would not pay by present estimates, new
drafters, and steps without drafts; and when a drafter rests, without even a plan being made for it. `trials` bounds how
often this happens and what it costs altogether."""

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
"""Standard deviations by which a comparison of costs may be wrong."""
PLAIN_EVERY = 64
"""Steps after which a plain one is due if drafting is ahead by less than `SURE` standard deviations."""
MOST_LIKELY = 0.95
"""Highest acceptance rate that a drafter could have. One that would not pay even so is not tried."""
TRIED = 2
"""Maximum tokens of a trial."""
REST, NEARLY = 7, 0.97
"""Steps for which a drafter rests, and the multiple of plain decoding's goodput below which its own makes it rest."""
SEEN = 16
"""Observed first tokens below which a drafter is new: its acceptance is hardly more than its prior."""
_ROWS = ""
"""The subject of trials of the cost of rows, rather than of a drafter."""


class Exploration:
    """Decides what to explore. `load` in its methods is `UpcomingStep.load`."""

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
        self._resting: dict[tuple[str, int], int] = {}  # steps left, by drafter and load
        self._hoping: dict[tuple[str, int], int] = {}  # the same
        self._longest = acceptance.longest

    def passed(self, seconds: float) -> None:
        """Observe the seconds of a step's pass."""
        self._trials.earn(seconds)

    def drafted(self, name: str, seconds: float) -> None:
        """Observe the seconds that a model-based drafter took."""
        if self.is_new(name):
            self._trials.advanced(seconds)

    def agreed(self, candidate: Candidate, tokens: Seq[int], token_seconds: float) -> None:
        """Observe the tokens at a candidate's positions, each of which takes `token_seconds` in plain decoding. Call it
        before `Acceptance.observe`."""
        for draft in candidate.drafts:
            if draft.drafter in candidate.asked and self.is_new(draft.drafter):
                self._trials.advanced(-token_seconds * _agreed(draft.tokens, tokens[:-1]))

    def is_new(self, name: str) -> bool:
        """Return whether little more is known of a drafter than its prior."""
        return self._acceptance.trials(name) < SEEN

    def won(self, name: str, load: int) -> None:
        """Record that the drafter pays without a trial."""
        self._trials.won((name, load))

    def rests(self, name: str, load: int) -> bool:
        """Count a step, and return whether a drafter that recently would not have paid rests in it."""
        left = self._resting.get((name, load), 0)
        if left:
            self._resting[name, load] = left - 1
            self._trials.wait((name, load))
        return left > 0

    def rest_unless_hopeful(
        self, step: UpcomingStep, name: str, load: int, plans: Mapping[str, DraftPlan | None] | None
    ) -> None:
        """Let a drafter rest unless it would nearly pay without any other drafts, which come and go with every token.
        `plans`: by drafter, its plan alone, if already made. A hopeful drafter is not judged again for some steps."""
        if left := self._hoping.get((name, load), 0):
            self._hoping[name, load] = left - 1
            return
        plain = self._forecast.plain_goodput(step)
        plan = self._planner.alone(step, plain, name, NEARLY) if plans is None else plans.get(name)
        hopeful = plan is not None and plan.goodput > NEARLY * plain
        (self._hoping if hopeful else self._resting)[name, load] = REST

    def advance(self, step: UpcomingStep, name: str, ask: Ask) -> Ask | None:
        """Return the part of `ask` that a new drafter's budget allows, or None. Candidates with the least backlog come
        first, and at most one more than the drafts observed so far, since its real cost may differ from the estimate.
        """
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
        """Return a trial of a drafter that does not pay by present estimates, if one is due."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return None
        if not self._trials.due((name, load)):
            return None
        may = [i for i, candidate in enumerate(step.candidates) if name in candidate.backlog]
        most = self._longest + (cost.block or 1)
        candidates = [i for i in may if step.candidates[i].backlog[name] <= most] or may[:1]
        length = self._longest if cost.block else min(TRIED, self._longest)
        loss = self._forecast.asking_seconds(step, name, candidates, length)
        if not self._trials.affordable(loss) or (self.is_new(name) and loss > self._budget(step)):
            return None
        # If the drafter may pay within what is uncertain, trials go on; else they get rarer.
        likely = self._planner.would_pay(step, best, name, may, self._acceptance.at_best(name))
        possible = likely or self._planner.would_pay(step, best, name, may, [MOST_LIKELY] * self._longest)
        self._trials.done((name, load), loss if possible else 0.0, rarer=not likely)
        return Ask(candidates, length) if possible else None

    def lengthened(self, best: DraftPlan, name: str, load: int) -> int:
        """Return the length to ask for: sometimes one more than pays by present estimates, since otherwise nothing is
        learned about later positions."""
        candidates, length = best.asks[name]
        if length >= self._longest:
            return length
        subject = (f"{name} {length + 1}", load)
        if not self._trials.due(subject):
            return length
        cost = self._drafting[name]
        loss = 0.0 if cost.block else cost.predict(len(candidates))
        if not self._trials.affordable(loss):
            return length
        last = sum(best.chances[i][length - 1] for i in candidates if len(best.chances[i]) >= length)
        possible = last * self._acceptance.at_best(name)[length] > best.goodput * loss
        self._trials.done(subject, loss if possible else 0.0, rarer=True)
        return length + int(possible)

    def pays(self, step: UpcomingStep, gain: float, count: int, plain_seconds: float) -> bool:
        """Return whether to draft if that promises `gain` times plain decoding's goodput with `count` more rows."""
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
        """Return the seconds that new drafters may cost in this step."""
        return self._trials.advance(self._forecast.seconds(step, 0)[0])


def _agreed(drafted: Seq[int], tokens: Seq[int]) -> int:
    """Return how many of the drafted tokens agree, up to the first that does not."""
    return next(
        (i for i, (one, other) in enumerate(zip(drafted, tokens, strict=False)) if one != other),
        min(len(drafted), len(tokens)),
    )
