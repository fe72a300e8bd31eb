"""Plans for a step: which candidate gets which drafter's draft at which length, and the goodput that promises. They
follow from present estimates; this module explores nothing and keeps no state."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from pilotfish.engine.draft import Draft
from pilotfish.engine.speculation.control.acceptance import Acceptance
from pilotfish.engine.speculation.control.candidates import UpcomingStep
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.forecast import CAUTION, Forecast
from pilotfish.engine.speculation.control.goodput import gains

GAIN = 1.02
"""Drafting must promise this multiple of plain decoding's goodput, and a model-based drafter this multiple of
what there is without it: predictions err, and a difference of a percent is noise."""
HORIZON = 32
"""Steps over which the first reading of a text should pay off; fewer if the answer ends sooner."""
WORTHLESS = 0.5
"""Multiple of a row's price, at plain decoding's goodput, below whose chance a token is not considered."""
ENOUGH = 2
"""Number of lengths that promise less than a shorter one, after which the search ends."""


Offer = tuple[float, int, float]
"""A drafted token that may be verified: what it adds to the step's worth (`goodput.gains`), negated, so that the best
sort first; its candidate; and the probability that it and those before it are accepted. A plain tuple, since a step
makes and sorts hundreds."""


class Ask(NamedTuple):
    """The candidates that a model-based drafter is asked to draft for, and the draft length."""

    candidates: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A plan for a step: by candidate, the `chances` of its drafted tokens; by name, the `asks` of model-based
    drafters; and the seconds that those take, `drafting`."""

    goodput: float
    chances: list[list[float]]
    drafting: float = 0.0
    asks: Mapping[str, Ask] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Offered:
    """A drafter's expected draft for a candidate."""

    candidate: int
    chances: list[float]
    reading: float = 0.0
    """Seconds to read the backlog, a step's share of them."""


class DraftPlanner:
    """Makes plans from `acceptance`, `forecast`, and the costs of model-based drafters' passes by name, `drafting`."""

    def __init__(self, acceptance: Acceptance, forecast: Forecast, drafting: Mapping[str, RowCost]) -> None:
        self._acceptance, self._forecast, self._drafting = acceptance, forecast, drafting
        self._longest = acceptance.longest

    def without(self, step: UpcomingStep) -> DraftPlan:
        """Return the best plan with the available drafts."""
        offers = self.best_drafts(step)[1]
        chances: list[list[float]] = [[] for _ in step.candidates]
        for _, i, chance in offers:
            chances[i].append(chance)
        return DraftPlan(self._forecast.goodput(step, [-minus_gain for minus_gain, _, _ in offers]), chances)

    def with_drafter(
        self, step: UpcomingStep, best: DraftPlan, name: str, price: float, gain: float = GAIN
    ) -> DraftPlan | None:
        """Return the best plan that also asks the drafter; None if it cannot reach `gain` times the goodput of `best`.
        `price`: of a row, in tokens."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return None
        asked = {i for ask in best.asks.values() for i in ask.candidates}
        if len(asked) == len(step.candidates):  # two models for one sequence do not pay
            return None
        may = [i for i, each in enumerate(step.candidates) if name in each.backlog and i not in asked]
        offered = [self._offered(step, name, i) for i in may]
        return self._joined(step, best, name, price, offered, gain)

    def alone(self, step: UpcomingStep, plain: float, name: str, gain: float) -> DraftPlan | None:
        """As `with_drafter`, if there were no other drafts. `plain`: the goodput without any drafts."""
        nothing = DraftPlan(plain, [[] for _ in step.candidates])
        return self.with_drafter(step, nothing, name, self._forecast.row_price(step, plain), gain)

    def would_pay(self, step: UpcomingStep, best: DraftPlan, name: str, may: Seq[int], rates: Seq[float]) -> bool:
        """Return whether a drafter would pay for the candidates in `may` if its tokens were accepted at these `rates`,
        each given that the tokens before were."""
        chances, alive = [], 1.0
        for rate in rates:
            alive *= rate
            chances.append(alive)
        offered = [_Offered(i, chances) for i in may]
        plan = self._joined(step, DraftPlan(best.goodput, best.chances), name, 0.0, offered, GAIN)
        return plan is not None and plan.goodput >= GAIN * best.goodput

    def best_drafts(self, step: UpcomingStep) -> tuple[dict[int, Draft], list[Offer]]:
        """Return the most valuable draft by candidate, and the offers of those drafts' tokens, in order."""
        price = self._forecast.row_price(step, self._forecast.plain_goodput(step))
        least, count = WORTHLESS * price, step.decoding
        picked: dict[int, Draft] = {}
        offers: list[Offer] = []
        for i, candidate in enumerate(step.candidates):
            best, most = None, 0.0
            for draft in candidate.drafts:
                chances = self._acceptance.survival(candidate.sequence.id, draft)
                if chances[0] < least:
                    continue
                worth = sum([chance - price for chance in chances if chance > price], chances[0] * 1e-6)
                if worth > most:
                    best, most, picked[i] = chances, worth, draft
            if best is not None:
                likely = [chance for chance in best if chance >= least]
                offers += [(-gain, i, each) for gain, each in zip(gains(count, likely), likely, strict=True)]
        return picked, offers

    def floor(self, step: UpcomingStep, plan: DraftPlan) -> float:
        """Return the chance below which the plan's drafters should stop, as further tokens are not worth drafting."""
        asked = sum(len(ask.candidates) for ask in plan.asks.values())
        if not asked:
            return 0.0
        costs = [(self._drafting[name], len(ask.candidates)) for name, ask in plan.asks.items()]
        seconds = sum(cost.predict(count) for cost, count in costs if not cost.block)
        return 0.5 * (plan.goodput * seconds / asked + self._forecast.row_price(step, plan.goodput))

    def _offered(self, step: UpcomingStep, name: str, i: int) -> _Offered:
        candidate, cost = step.candidates[i], self._drafting[name]
        chances = self._acceptance.expected(candidate.sequence.id, name)[: candidate.limit]
        own = cost.block or 1
        if (rows := candidate.backlog[name]) <= own:
            return _Offered(i, chances)
        left = candidate.sequence.params.max_tokens - candidate.sequence.output_len
        steps = max(1, min(HORIZON, left // 2)) if rows > self._longest + own else 1
        return _Offered(i, chances, max(0.0, cost.predict(rows) - cost.predict(own)) / steps)

    def _joined(
        self, step: UpcomingStep, best: DraftPlan, name: str, price: float, offered: Seq[_Offered], gain: float
    ) -> DraftPlan | None:
        """Return `best` with the candidates that gain by it given to the drafter, at the best length for them all."""
        cost, goodput = self._drafting[name], best.goodput
        most = max(2, len(step.candidates))
        token_context = cost.context_token * step.context / step.decoding
        own = cost.block or 1
        passes = cost.seconds(0, most * own)[::own]  # of so many candidates
        a_row = (passes[most] - passes[1]) / (most - 1) + token_context
        # By length: the candidates that gain, and the tokens they gain beyond the cost of the drafter's rows.
        given: list[list[_Offered]] = [[] for _ in range(self._longest)]
        gained = [0.0] * self._longest
        for each in offered:
            has = sum([chance - price for chance in best.chances[each.candidate] if chance > price])
            value = -has - goodput * each.reading
            for at, chance in enumerate(each.chances):
                value += max(0.0, chance - price) - (0.0 if at and cost.block else goodput * a_row)
                if value > 0.0:
                    given[at].append(each)
                    gained[at] += value
        a_pass = goodput * (passes[1] + token_context - a_row)
        least = (gain - 1.0) * step.decoding
        found, worse = None, 0
        for length, (candidates, tokens) in enumerate(zip(given, gained, strict=True), 1):
            times = 1 if cost.block else length
            if not candidates or tokens - a_pass * times < least:
                continue
            chances = list(best.chances)
            for each in candidates:
                chances[each.candidate] = each.chances[:length]
            drafting = (passes[len(candidates)] + token_context * len(candidates)) * times
            drafting = best.drafting + CAUTION * (drafting + sum([each.reading for each in candidates]))
            promised = self._forecast.goodput(
                step, [each for draft in chances for each in gains(step.decoding, draft)], drafting
            )
            if found is None or promised > found.goodput:
                ask = Ask([each.candidate for each in candidates], length)
                found = DraftPlan(promised, chances, drafting, {**best.asks, name: ask})
            elif (worse := worse + 1) == ENOUGH:
                break
        return found
