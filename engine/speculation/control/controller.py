"""The controller chooses drafters and draft lengths for each sequence at each step; no draft is always a choice.

It maximizes the goodput of the whole batch: expected committed tokens over predicted seconds. Expectations come from
observed acceptance (`acceptance`), seconds from measured passes (`cost`, `forecast`); `plans` compares the ways to
draft for a step, and `exploration` decides what is done only to learn. The text never depends on its choices, and its
choices depend only on what it observes, so it can be tested without a model or a clock. It keeps no state of a step:
what the outcome is compared with is in the step's `Choice`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from pilotfish.engine.draft import shortened
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.acceptance import Acceptance
from pilotfish.engine.speculation.control.backoff import MANY, DraftingBackoff
from pilotfish.engine.speculation.control.candidates import Choice, Promise, UpcomingStep
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.exploration import NEARLY, Exploration
from pilotfish.engine.speculation.control.forecast import CAUTION, Forecast
from pilotfish.engine.speculation.control.goodput import goodputs
from pilotfish.engine.speculation.control.plans import GAIN, Ask, DraftPlan, DraftPlanner, Offer
from pilotfish.engine.speculation.drafters.drafter import DraftRequest


class Controller:
    """At each step `ask` says which model-based drafters to ask, and `choose` what to verify; the `observe_*` methods
    report the outcome.

    `longest`: maximum tokens of a draft; `lengths`: by lookup drafter, where it is another. `priors`: by drafter, the
    probability that its first token is accepted, assumed until some have been observed. `target` and `drafting` may be
    calibrated before the first step.
    """

    def __init__(
        self,
        longest: int = 8,
        priors: Mapping[str, float] | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self.acceptance = Acceptance(longest, priors, lengths)
        self.target = RowCost()
        self.drafting: dict[str, RowCost] = {}
        """Costs of the model-based drafters' passes, by name."""
        self._forecast = Forecast(self.target, self.drafting)
        self._planner = DraftPlanner(self.acceptance, self._forecast, self.drafting)
        self._exploration = Exploration(self.acceptance, self._forecast, self._planner, self.target, self.drafting)
        self._backoff = DraftingBackoff()
        self._longest = longest

    def should_skip(self, step: UpcomingStep) -> bool:
        """Return whether to skip drafting for the step, because choosing takes more time than drafts save."""
        if not step.candidates or step.decoding < MANY:
            return False
        new = any(candidate.sequence.output_len <= 1 for candidate in step.candidates)
        return self._backoff.should_skip(step.load, new)

    def ask(self, step: UpcomingStep) -> dict[str, list[DraftRequest]]:
        """Return the requests to make of model-based drafters, by name."""
        names = dict.fromkeys(name for candidate in step.candidates for name in candidate.backlog)
        if not names:
            return {}
        if not self.target.known:
            return {name: _requests(step, name, range(len(step.candidates)), self._longest, 0.0) for name in names}
        exploration, load = self._exploration, step.load
        open_names = [name for name in names if not exploration.rests(name, load)]
        if not open_names:
            return {}
        best = self._planner.without(step)
        empty = not any(best.chances)
        price = self._forecast.row_price(step, best.goodput)
        alone: dict[str, DraftPlan | None] | None = None
        advances: dict[str, Ask] = {}
        while open_names:
            gain = NEARLY if empty and alone is None else GAIN
            plans = {name: self._planner.with_drafter(step, best, name, price, gain) for name in open_names}
            alone = plans if alone is None and empty else alone
            name, plan = max(plans.items(), key=lambda item: item[1].goodput if item[1] else 0.0)
            if plan is None or plan.goodput < GAIN * best.goodput:
                break
            open_names.remove(name)
            exploration.won(name, load)
            if not exploration.is_new(name):
                best = plan
            elif (advance := exploration.advance(step, name, plan.asks[name])) is not None:
                advances[name] = advance
        longer = {
            name: Ask(ask.candidates, exploration.lengthened(best, name, load)) for name, ask in best.asks.items()
        }
        asks = {**longer, **advances}
        for name in open_names:
            trial = exploration.trial(step, best, name, load) if not asks else None
            if trial is not None:
                asks[name] = trial
            else:
                exploration.rest_unless_hopeful(step, name, load, alone)
        floor = self._planner.floor(step, best)
        return {name: _requests(step, name, ask.candidates, ask.length, floor) for name, ask in asks.items()}

    def choose(self, step: UpcomingStep) -> Choice:
        """Choose the tokens worth verifying among the available drafts.

        These are of each sequence's best draft, and of all those the likeliest tokens. A token is never likelier than
        the one before it, so the choice is a prefix of each draft.
        """
        candidates = {candidate.sequence: candidate for candidate in step.candidates}
        if not self.target.known:
            first = {sequence: each.drafts[0] for sequence, each in candidates.items() if each.drafts}
            return Choice(first, candidates=candidates)
        if not step.decoding:
            return Choice({})
        spent = self._forecast.drafting_seconds(step)
        picked, offers = self._planner.best_drafts(step)
        seconds = self._forecast.seconds(step, len(offers))
        plain = seconds[0]
        taken = self._worth_verifying(step, offers, seconds, plain + spent) if offers else []
        lengths: dict[int, int] = {}
        for _, i, _ in taken:
            lengths[i] = lengths.get(i, 0) + 1
        chosen = {step.candidates[i].sequence: shortened(picked[i], length) for i, length in lengths.items()}
        tokens = step.decoding + sum([chance for _, _, chance in taken])
        prompts = self._forecast.prompt_seconds(step, plain)
        took = seconds[len(taken)] + spent
        return Choice(
            chosen,
            goodput=self._forecast.reported_goodput(tokens, took + prompts),
            plain_goodput=self._forecast.reported_goodput(step.decoding, plain + prompts),
            load=step.load,
            promise=Promise(tokens / took * plain / step.decoding, plain),
            token_seconds=plain / step.decoding,
            candidates=candidates,
        )

    def observe_choosing(self, choice: Choice, seconds: float) -> None:
        """Observe the seconds that choosing took: `ask`, `choose` and the lookup drafters."""
        if choice.promise is not None:
            gain, plain = choice.promise
            self._backoff.observe(choice.load, gain, seconds / plain)

    def observe_step(self, rows: int, seconds: float, context: int = 0, prompts: bool = False) -> None:
        """Observe the target's pass over `rows` rows and `context` tokens of context. `prompts`: whether rows of
        prompts are among them, most of which need no logits."""
        self._forecast.observe_step(rows, seconds, context, prompts)
        self._exploration.passed(seconds)

    def observe_overhead(self, seconds: float, drawing: float, tokens: int) -> None:
        """Observe the seconds of a step beside its passes, and those of them spent `drawing` its tokens."""
        self._forecast.observe_overhead(seconds, drawing, tokens)

    def observe_drafting(self, drafter: str, passes: Seq[int], seconds: float, context: int = 0) -> None:
        """Observe a model-based drafter's passes: the rows of each, and the tokens of the sequences in `context`."""
        if passes:
            self._forecast.observe_drafting(drafter, passes, seconds, context)
            self._exploration.drafted(drafter, seconds)

    def observe_tokens(self, choice: Choice, sequence: Sequence, tokens: Seq[int]) -> None:
        """Observe the target's tokens at the positions of a sequence's drafts, whether verified or not."""
        candidate = choice.candidates.get(sequence)
        if candidate is None:
            self.acceptance.observe(sequence.id, (), tokens, {})
            return
        if candidate.asked:
            self._exploration.agreed(candidate, tokens, choice.token_seconds)
        self.acceptance.observe(sequence.id, candidate.drafts, tokens, candidate.asked)

    def release(self, sequence: Sequence) -> None:
        self.acceptance.release(sequence.id)

    def _worth_verifying(
        self, step: UpcomingStep, offers: list[Offer], seconds: list[float], plain_seconds: float
    ) -> list[Offer]:
        """Return the offers to take, best first. `seconds`: the step's, by the number of offers taken; with none taken,
        the whole step takes `plain_seconds`."""
        offers.sort()
        cautious = [plain_seconds + CAUTION * (taken - seconds[0]) for taken in seconds]
        plain, *promised = goodputs(step.decoding, [-minus_gain for minus_gain, _, _ in offers], cautious)
        gain = max(promised) / plain
        count = promised.index(max(promised)) + 1
        if not self._exploration.pays(step, gain, count, plain_seconds):
            return []
        # Sequences that expect less weigh more, but a row must still yield the step's average for its time.
        taken = offers[:count]
        tokens = step.decoding + sum([chance for _, _, chance in taken])
        row = cautious[count] - cautious[count - 1]
        least = row * tokens / cautious[count]
        return [offer for offer in taken if offer[2] >= least]


def _requests(
    step: UpcomingStep, name: str, candidates: Iterable[int], length: int, floor: float
) -> list[DraftRequest]:
    """Make the requests to one drafter for those of `candidates` that may use it, and record them there."""
    requests = []
    for i in candidates:
        candidate = step.candidates[i]
        if name in candidate.backlog:
            candidate.asked[name] = min(candidate.limit, length)
            requests.append(DraftRequest(candidate.sequence, candidate.asked[name], floor))
    return requests
