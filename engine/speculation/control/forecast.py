"""Forecasts of a step's seconds, and of its goodput with given drafts, from the steps so far. `cost` predicts passes;
this module adds the rest of a step. No policy here."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from pilotfish.engine.speculation.control.candidates import UpcomingStep
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.goodput import goodputs

CAUTION = 1.1
"""Factor on the predicted cost of rows and drafts: a token that barely pays is not worth its risk."""
SMOOTHING = 0.05
"""Weight of a step in the moving averages."""


class Forecast:
    """Predicts the seconds of steps and of their drafts, and goodput in tokens per second.

    `target`: costs of the target's passes. `drafting`: by name, those of the model-based drafters. The caller may
    calibrate both; observations here update them.
    """

    def __init__(self, target: RowCost, drafting: dict[str, RowCost]) -> None:
        self._target, self._drafting = target, drafting
        self._overhead = self._drawing = 0.0  # seconds of a step beside its passes; of a token's drawing
        self._reading = 1.0  # what a step with prompts takes, as a multiple of one with as many rows to verify

    def observe_step(self, rows: int, seconds: float, context: int, prompts: bool) -> None:
        """Observe the target's pass. With rows of prompts, most of which need no logits, it says nothing about the cost
        of verified rows."""
        if not prompts:
            self._target.observe(rows, seconds, context)
        elif self._target.known:
            self._reading += SMOOTHING * (seconds / self._target.predict(rows, context) - self._reading)

    def observe_overhead(self, seconds: float, drawing: float, tokens: int) -> None:
        """Observe the seconds of a step beside its passes, and those of them spent `drawing` its tokens."""
        self._overhead += SMOOTHING * (seconds - drawing - self._overhead)
        if tokens:
            self._drawing += SMOOTHING * (drawing / tokens - self._drawing)

    def observe_drafting(self, drafter: str, passes: Seq[int], seconds: float, context: int) -> None:
        """Observe a drafter's passes, at least one: the rows of each, and the tokens of the sequences in `context`."""
        self._drafting.setdefault(drafter, RowCost()).observe_passes(passes, seconds, context * len(passes))

    def seconds(self, step: UpcomingStep, drafted: int) -> list[float]:
        """Return the seconds of the step with 0, 1, ... `drafted` rows of drafts.

        The time of prompt rows is left out, since it is spent anyway and would make drafts look cheap. It only sets
        where on the cost curve further rows are added.
        """
        beside = self._overhead
        if step.rows > step.decoding:
            beside -= self._target.predict(step.rows) - self._target.predict(step.decoding)
        return [beside + seconds for seconds in self._target.seconds(step.rows, step.rows + drafted, step.context)]

    def prompt_seconds(self, step: UpcomingStep, plain: float) -> float:
        """Return the seconds of the step's prompts, which `seconds` leaves out. `plain`: its result without drafts."""
        whole = self._target.predict(step.rows, step.context) * (self._reading if step.rows > step.decoding else 1.0)
        return whole + self._overhead - plain

    def drafting_seconds(self, step: UpcomingStep) -> float:
        """Return the seconds of all the drafts that were asked for."""
        spent = 0.0
        for name in sorted({name for candidate in step.candidates for name in candidate.asked}):
            asked = {i: each.asked[name] for i, each in enumerate(step.candidates) if name in each.asked}
            spent += self.asking_seconds(step, name, list(asked), max(asked.values()))
        return spent

    def asking_seconds(self, step: UpcomingStep, name: str, candidates: Seq[int], length: int) -> float:
        """Return the seconds of drafts of `length` tokens for these candidates, including their backlog; 0 if the cost
        of the drafter's passes is unknown."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return 0.0
        context = step.context * len(candidates) // step.decoding
        rows = sum(step.candidates[i].backlog[name] for i in candidates)
        if cost.block:
            return cost.predict(rows, context)
        return cost.predict(rows, context) + (length - 1) * cost.predict(len(candidates), context)

    def row_price(self, step: UpcomingStep, goodput: float) -> float:
        """Return the tokens that the seconds of one more row are worth."""
        more = max(4, len(step.candidates))
        seconds = self._target.predict(step.rows + more) - self._target.predict(step.rows)
        return CAUTION * goodput * seconds / more

    def plain_goodput(self, step: UpcomingStep) -> float:
        """Return the goodput without drafts."""
        return step.decoding / self.seconds(step, 0)[0]

    def goodput(self, step: UpcomingStep, gained: list[float], drafting: float = 0.0) -> float:
        """Return the highest goodput with any number of drafted tokens, which add `gained` each; drafting them takes
        `drafting` seconds."""
        plain, *more = self.seconds(step, len(gained))
        first = plain + drafting
        seconds = [first, *(first + CAUTION * (taken - plain) for taken in more)]
        return max(goodputs(step.decoding, sorted(gained, reverse=True), seconds))

    def reported_goodput(self, tokens: float, seconds: float) -> float:
        """Return goodput as metrics report it, which includes the time of drawing the tokens."""
        return tokens / (seconds + tokens * self._drawing) if tokens else 0.0
