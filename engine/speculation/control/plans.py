"""Ways to go through a step: which turn gets whose draft at which length, and what that promises. All from what is
known at the moment: nothing is tried, learned or remembered here."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pilotfish.engine.speculation.control.acceptance import Acceptance
from pilotfish.engine.speculation.control.candidates import Step
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.forecast import CAUTION, Forecast
from pilotfish.engine.speculation.control.goodput import gains
from pilotfish.engine.speculation.drafters.drafter import Draft

GAIN = 1.02
"""Drafting must promise this multiple of plain decoding's goodput, and a drafter that costs time this multiple of what
there is without it: predictions err, and a difference of a percent is noise."""
HORIZON = 32
"""Steps over which reading a text for the first time should pay off, less where the answer ends sooner."""
WORTHLESS = 0.5
"""A token is not looked at whose chance is below this multiple of what its row costs at plain decoding's goodput."""
ENOUGH = 2
"""Lengths that promise less than a shorter one, after which longer ones are not looked at."""

Offer = tuple[float, int, float]
"""A drafted token: minus its gain (`goodput.gains`), so that the best sort first; its turn; its chance."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A way to go through a step: by turn the `chances` of what it would get, as far as that goes; `asks` by drafter
    that costs time, as (which turns, how many tokens); `drafting` seconds for them."""

    goodput: float
    chances: list[list[float]]
    drafting: float = 0.0
    asks: Mapping[str, tuple[list[int], int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Offered:
    """What a drafter may bring a turn."""

    turn: int
    chances: list[float]
    reading: float = 0.0
    """Seconds that it has to read before, a step's share of them."""


class Planner:
    """Plans from what is known of `acceptance`, of steps (`forecast`) and of the passes of those drafters that cost
    time (`drafting`, by name)."""

    def __init__(self, acceptance: Acceptance, forecast: Forecast, drafting: Mapping[str, RowCost]) -> None:
        self._acceptance, self._forecast, self._drafting = acceptance, forecast, drafting
        self._longest = acceptance.longest

    def without(self, step: Step) -> Plan:
        """The best that can be done with the drafts that are there."""
        offers = self.best_drafts(step)[1]
        chances: list[list[float]] = [[] for _ in step.turns]
        for _, i, chance in offers:
            chances[i].append(chance)
        return Plan(self._forecast.goodput(step, [-offer[0] for offer in offers]), chances)

    def with_drafter(self, step: Step, best: Plan, name: str, price: float, gain: float = GAIN) -> Plan | None:
        """The best plan in which the drafter is asked, too; None if it can not come to `gain` times what `best`
        promises. `price`: of a row, in tokens."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return None
        asked = {i for turns, _ in best.asks.values() for i in turns}
        if len(asked) == len(step.turns):  # two that cost time for one sequence do not pay
            return None
        offered = [
            self._offered(step, name, i) for i, turn in enumerate(step.turns) if name in turn.backlog and i not in asked
        ]
        return self._joined(step, best, name, price, offered, gain)

    def alone(self, step: Step, plain: float, name: str, gain: float) -> Plan | None:
        """As `with_drafter`, if there were no other drafts. `plain`: the goodput without any."""
        nothing = Plan(plain, [[] for _ in step.turns])
        return self.with_drafter(step, nothing, name, self._forecast.row_price(step, plain), gain)

    def would_pay(self, step: Step, best: Plan, name: str, may: Seq[int], rates: Seq[float]) -> bool:
        """Whether a drafter would pay for the turns that `may`, if its tokens were right that often one after the
        other."""
        chances, alive = [], 1.0
        for rate in rates:
            alive *= rate
            chances.append(alive)
        offered = [_Offered(i, chances) for i in may]
        plan = self._joined(step, Plan(best.goodput, best.chances), name, 0.0, offered, GAIN)
        return plan is not None and plan.goodput >= GAIN * best.goodput

    def best_drafts(self, step: Step) -> tuple[dict[int, Draft], list[Offer]]:
        """By turn the draft that is worth most; and each of those drafts' tokens that is worth anything, a draft's in
        their order."""
        price = self._forecast.row_price(step, self._forecast.plain_goodput(step))
        least, count = WORTHLESS * price, step.decoding
        picked: dict[int, Draft] = {}
        offers: list[Offer] = []
        for i, turn in enumerate(step.turns):
            best, most = None, 0.0
            for draft in turn.drafts:
                chances = self._acceptance.survival(turn.sequence.id, draft)
                if chances[0] < least:
                    continue
                worth = sum([chance - price for chance in chances if chance > price], chances[0] * 1e-6)
                if worth > most:
                    best, most, picked[i] = chances, worth, draft
            if best is not None:
                likely = [chance for chance in best if chance >= least]
                offers += [(-gain, i, each) for gain, each in zip(gains(count, likely), likely, strict=True)]
        return picked, offers

    def floor(self, step: Step, plan: Plan) -> float:
        """The chance below which a token is not worth being drafted by those that the plan asks, let alone verified."""
        asked = sum(len(turns) for turns, _ in plan.asks.values())
        if not asked:
            return 0.0
        seconds = sum(self._drafting[name].predict(len(turns)) for name, (turns, _) in plan.asks.items())
        return 0.5 * (plan.goodput * seconds / asked + self._forecast.row_price(step, plan.goodput))

    def _offered(self, step: Step, name: str, i: int) -> _Offered:
        turn, cost = step.turns[i], self._drafting[name]
        chances = self._acceptance.expected(turn.sequence.id, name)[: turn.limit]
        if (rows := turn.backlog[name]) <= 1:
            return _Offered(i, chances)
        left = turn.sequence.params.max_tokens - turn.sequence.output_len
        steps = max(1, min(HORIZON, left // 2)) if rows > self._longest + 1 else 1
        return _Offered(i, chances, max(0.0, cost.predict(rows) - cost.predict(1)) / steps)

    def _joined(
        self, step: Step, best: Plan, name: str, price: float, offered: Seq[_Offered], gain: float
    ) -> Plan | None:
        """`best` with those turns given to the drafter that gain by it, at the length that is best for all."""
        cost, goodput = self._drafting[name], best.goodput
        most = max(2, len(step.turns))
        token_context = cost.context_token * step.context / step.decoding
        passes = cost.seconds(0, most)
        a_row = (passes[most] - passes[1]) / (most - 1) + token_context
        # By length: who gains by it, and how many tokens all of them do beyond what the rows of its passes cost.
        given: list[list[_Offered]] = [[] for _ in range(self._longest)]
        gained = [0.0] * self._longest
        for each in offered:
            has = sum([chance - price for chance in best.chances[each.turn] if chance > price])
            value = -has - goodput * each.reading
            for at, chance in enumerate(each.chances):
                value += max(0.0, chance - price) - goodput * a_row
                if value > 0.0:
                    given[at].append(each)
                    gained[at] += value
        a_pass = goodput * (passes[1] + token_context - a_row)
        least = (gain - 1.0) * step.decoding
        found, worse = None, 0
        for length, (turns, tokens) in enumerate(zip(given, gained, strict=True), 1):
            if not turns or tokens - a_pass * length < least:
                continue
            chances = list(best.chances)
            for each in turns:
                chances[each.turn] = each.chances[:length]
            drafting = (passes[len(turns)] + token_context * len(turns)) * length
            drafting = best.drafting + CAUTION * (drafting + sum([each.reading for each in turns]))
            promised = self._forecast.goodput(
                step, [each for draft in chances for each in gains(step.decoding, draft)], drafting
            )
            if found is None or promised > found.goodput:
                found = Plan(promised, chances, drafting, {**best.asks, name: ([each.turn for each in turns], length)})
            elif (worse := worse + 1) == ENOUGH:
                break
        return found
