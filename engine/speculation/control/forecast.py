"""What a step will take, and the goodput of ways to go through it, from what steps took so far. Passes are predicted by
`cost`; here are the whole steps around them. What to do about it is not decided here."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from pilotfish.engine.speculation.control.candidates import UpcomingStep
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.goodput import goodputs

CAUTION = 1.1
"""What rows and drafts are taken to cost, as a multiple of what they are predicted to: a token that just about pays is
not worth its risk."""
SMOOTHING = 0.05
"""Weight of a step's overhead against what is known of it."""


class Forecast:
    """Seconds of steps and of the drafts for them, and goodput in tokens per second.

    `target`: passes of the target. `drafting`: by name, passes of the model-based drafters. Both are the caller's,
    who may calibrate them; what is observed here goes into them.
    """

    def __init__(self, target: RowCost, drafting: dict[str, RowCost]) -> None:
        self._target, self._drafting = target, drafting
        self._overhead = self._drawing = 0.0  # seconds of a step beside its passes; of a token's drawing
        self._reading = 1.0  # what a step with prompts takes, as a multiple of one with as many rows to verify

    def observe_step(self, rows: int, seconds: float, context: int, prompts: bool) -> None:
        """The target's pass over so many rows and tokens of context took so long. `prompts`: rows of prompts are among
        them, most of which need no logits. So it says nothing of what rows cost that are verified."""
        if not prompts:
            self._target.observe(rows, seconds, context)
        elif self._target.known:
            self._reading += SMOOTHING * (seconds / self._target.predict(rows, context) - self._reading)

    def observe_overhead(self, seconds: float, drawing: float, tokens: int) -> None:
        """What the step took beside its passes, and of that the drawing of so many tokens."""
        self._overhead += SMOOTHING * (seconds - drawing - self._overhead)
        if tokens:
            self._drawing += SMOOTHING * (drawing / tokens - self._drawing)

    def observe_drafting(self, drafter: str, passes: Seq[int], seconds: float, context: int) -> None:
        """A drafter took so long for passes of so many rows, at least one, over sequences of so many tokens."""
        self._drafting.setdefault(drafter, RowCost()).observe_passes(passes, seconds, context * len(passes))

    def seconds(self, step: UpcomingStep, drafted: int) -> list[float]:
        """Seconds of the step with 0, 1, ... `drafted` rows of drafts.

        Rows of prompts, whose time has to be spent anyhow, count for what more rows cost on top of them, but not
        themselves: else a long step would make drafts look cheap that are not.
        """
        beside = self._overhead
        if step.rows > step.decoding:
            beside -= self._target.predict(step.rows) - self._target.predict(step.decoding)
        return [beside + seconds for seconds in self._target.seconds(step.rows, step.rows + drafted, step.context)]

    def prompt_seconds(self, step: UpcomingStep, plain: float) -> float:
        """Seconds of the step's prompts, which `seconds` leaves out; without drafts it says `plain`."""
        whole = self._target.predict(step.rows, step.context) * (self._reading if step.rows > step.decoding else 1.0)
        return whole + self._overhead - plain

    def drafting_seconds(self, step: UpcomingStep) -> float:
        """Seconds of all the drafts that were asked for."""
        spent = 0.0
        for name in sorted({name for candidate in step.candidates for name in candidate.asked}):
            asked = {i: each.asked[name] for i, each in enumerate(step.candidates) if name in each.asked}
            spent += self.asking_seconds(step, name, list(asked), max(asked.values()))
        return spent

    def asking_seconds(self, step: UpcomingStep, name: str, candidates: Seq[int], length: int) -> float:
        """Seconds of drafts of such a length for these candidates, with all that has to be read before; 0 if nothing is
        known of the drafter's passes."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return 0.0
        context = step.context * len(candidates) // step.decoding
        rows = sum(step.candidates[i].backlog[name] for i in candidates)
        return cost.predict(rows, context) + (length - 1) * cost.predict(len(candidates), context)

    def row_price(self, step: UpcomingStep, goodput: float) -> float:
        """Tokens that the seconds of one more row are worth."""
        more = max(4, len(step.candidates))
        seconds = self._target.predict(step.rows + more) - self._target.predict(step.rows)
        return CAUTION * goodput * seconds / more

    def plain_goodput(self, step: UpcomingStep) -> float:
        """Goodput without drafts."""
        return step.decoding / self.seconds(step, 0)[0]

    def goodput(self, step: UpcomingStep, gained: list[float], drafting: float = 0.0) -> float:
        """The highest there is with some of the drafted tokens that gain so much each, in `drafting` seconds."""
        plain, *more = self.seconds(step, len(gained))
        first = plain + drafting
        seconds = [first, *(first + CAUTION * (taken - plain) for taken in more)]
        return max(goodputs(step.decoding, sorted(gained, reverse=True), seconds))

    def reported_goodput(self, tokens: float, seconds: float) -> float:
        """Goodput as metrics report it: the drawing of so many tokens takes time as well."""
        return tokens / (seconds + tokens * self._drawing) if tokens else 0.0
