"""Ways to go through a step: which candidate gets whose draft at which length, and what that promises. All of it from
what is known at the moment: nothing is tried, learned or remembered here."""

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
"""Steps over which reading a text for the first time should pay off, less where the answer ends sooner."""
WORTHLESS = 0.5
"""A token is not looked at whose chance is below this multiple of what its row costs at plain decoding's goodput."""
ENOUGH = 2
"""Lengths that promise less than a shorter one, after which longer ones are not looked at."""


Offer = tuple[float, int, float]
"""A drafted token that may be verified: what it adds to the step's worth (`goodput.gains`), negated, so that the best
sort first; its candidate; and the probability that it and those before it are accepted. A plain tuple, since a step
makes and sorts hundreds."""


class Ask(NamedTuple):
    """Drafts that a model-based drafter is asked for."""

    candidates: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A way to go through a step: by candidate the `chances` of what it would get, as far as that goes; what it
    `asks` of model-based drafters, by name, and the `drafting` seconds for that."""

    goodput: float
    chances: list[list[float]]
    drafting: float = 0.0
    asks: Mapping[str, Ask] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Offered:
    """What a drafter may bring a candidate."""

    candidate: int
    chances: list[float]
    reading: float = 0.0
    """Seconds that it has to read before, a step's share of them."""


class DraftPlanner:
    """Plans from what is known of `acceptance`, of steps (`forecast`) and of the passes of model-based drafters
    (`drafting`, by name)."""

    def __init__(self, acceptance: Acceptance, forecast: Forecast, drafting: Mapping[str, RowCost]) -> None:
        self._acceptance, self._forecast, self._drafting = acceptance, forecast, drafting
        self._longest = acceptance.longest

    def without(self, step: UpcomingStep) -> DraftPlan:
        """The best that can be done with the drafts that are there."""
        offers = self.best_drafts(step)[1]
        chances: list[list[float]] = [[] for _ in step.candidates]
        for _, i, chance in offers:
            chances[i].append(chance)
        return DraftPlan(self._forecast.goodput(step, [-minus_gain for minus_gain, _, _ in offers]), chances)

    def with_drafter(
        self, step: UpcomingStep, best: DraftPlan, name: str, price: float, gain: float = GAIN
    ) -> DraftPlan | None:
        """The best plan in which the drafter is asked, too; None if it can not come to `gain` times what `best`
        promises. `price`: of a row, in tokens."""
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
        """As `with_drafter`, if there were no other drafts. `plain`: the goodput without any."""
        nothing = DraftPlan(plain, [[] for _ in step.candidates])
        return self.with_drafter(step, nothing, name, self._forecast.row_price(step, plain), gain)

    def would_pay(self, step: UpcomingStep, best: DraftPlan, name: str, may: Seq[int], rates: Seq[float]) -> bool:
        """Whether a drafter would pay for the candidates that `may`, if its tokens were right that often one after the
        other."""
        chances, alive = [], 1.0
        for rate in rates:
            alive *= rate
            chances.append(alive)
        offered = [_Offered(i, chances) for i in may]
        plan = self._joined(step, DraftPlan(best.goodput, best.chances), name, 0.0, offered, GAIN)
        return plan is not None and plan.goodput >= GAIN * best.goodput

    def best_drafts(self, step: UpcomingStep) -> tuple[dict[int, Draft], list[Offer]]:
        """By candidate the draft that is worth most; and each of those drafts' tokens that is worth anything, a draft's
        in their order."""
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
        """The chance below which a token is not worth being drafted by those that the plan asks, let alone verified."""
        asked = sum(len(ask.candidates) for ask in plan.asks.values())
        if not asked:
            return 0.0
        seconds = sum(self._drafting[name].predict(len(ask.candidates)) for name, ask in plan.asks.items())
        return 0.5 * (plan.goodput * seconds / asked + self._forecast.row_price(step, plan.goodput))

    def _offered(self, step: UpcomingStep, name: str, i: int) -> _Offered:
        candidate, cost = step.candidates[i], self._drafting[name]
        chances = self._acceptance.expected(candidate.sequence.id, name)[: candidate.limit]
        if (rows := candidate.backlog[name]) <= 1:
            return _Offered(i, chances)
        left = candidate.sequence.params.max_tokens - candidate.sequence.output_len
        steps = max(1, min(HORIZON, left // 2)) if rows > self._longest + 1 else 1
        return _Offered(i, chances, max(0.0, cost.predict(rows) - cost.predict(1)) / steps)

    def _joined(
        self, step: UpcomingStep, best: DraftPlan, name: str, price: float, offered: Seq[_Offered], gain: float
    ) -> DraftPlan | None:
        """`best` with those candidates given to the drafter that gain by it, at the length that is best for all."""
        cost, goodput = self._drafting[name], best.goodput
        most = max(2, len(step.candidates))
        token_context = cost.context_token * step.context / step.decoding
        passes = cost.seconds(0, most)
        a_row = (passes[most] - passes[1]) / (most - 1) + token_context
        # By length: who gains by it, and how many tokens all of them do beyond what the rows of its passes cost.
        given: list[list[_Offered]] = [[] for _ in range(self._longest)]
        gained = [0.0] * self._longest
        for each in offered:
            has = sum([chance - price for chance in best.chances[each.candidate] if chance > price])
            value = -has - goodput * each.reading
            for at, chance in enumerate(each.chances):
                value += max(0.0, chance - price) - goodput * a_row
                if value > 0.0:
                    given[at].append(each)
                    gained[at] += value
        a_pass = goodput * (passes[1] + token_context - a_row)
        least = (gain - 1.0) * step.decoding
        found, worse = None, 0
        for length, (candidates, tokens) in enumerate(zip(given, gained, strict=True), 1):
            if not candidates or tokens - a_pass * length < least:
                continue
            chances = list(best.chances)
            for each in candidates:
                chances[each.candidate] = each.chances[:length]
            drafting = (passes[len(candidates)] + token_context * len(candidates)) * length
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
