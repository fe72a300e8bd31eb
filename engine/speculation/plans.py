"""Ways to go through a step: which turn gets whose draft at which length, and what that promises. All from what is
known at the moment: nothing is tried, learned or remembered here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.speculation.acceptance import Acceptance
from engine.speculation.cost import RowCost
from engine.speculation.drafter import Draft
from engine.speculation.forecast import CAUTION, Forecast
from engine.speculation.goodput import EVEN
from engine.speculation.turns import Step

GAIN = 1.02
"""Drafting must promise this multiple of plain decoding's goodput, and a drafter that costs time this multiple of what
there is without it: predictions err, and a difference of a percent is noise."""
HORIZON = 32
"""Steps over which reading a text for the first time should pay off, less where the answer ends sooner."""
WORTHLESS = 0.5
"""A token is not looked at whose chance is below this multiple of what its row costs at plain decoding's goodput."""

Offer = tuple[float, int, float]
"""A drafted token: minus its gain (`goodput.gains`), so that the best sort first; its turn; its chance."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A way to go through a step: `chances` of what each turn would get, (turns, longest); `asks` by costly drafter, as
    (which turns, how many tokens); `drafting` seconds for them."""

    goodput: float
    chances: np.ndarray
    drafting: float = 0.0
    asks: Mapping[str, tuple[np.ndarray, int]] = field(default_factory=dict)


class Planner:
    """Plans from what is known of `acceptance`, of steps (`forecast`) and of the passes of those drafters that cost
    time (`drafting`, by name)."""

    def __init__(self, acceptance: Acceptance, forecast: Forecast, drafting: Mapping[str, RowCost]) -> None:
        self._acceptance, self._forecast, self._drafting = acceptance, forecast, drafting
        self._longest = longest = acceptance.longest
        self._lengths = np.arange(1, longest + 1)
        self._within = (self._lengths <= self._lengths[:, None])[:, None, :]  # (lengths, 1, positions)

    def without(self, step: Step) -> Plan:
        """The best that can be done with the drafts that are there."""
        plain = self._forecast.plain_goodput(step)
        chances = np.zeros((len(step.turns), self._longest))
        goodput, offers = plain, self.best_drafts(step)[1]
        if offers:
            filled: dict[int, int] = {}
            for _, i, chance in offers:
                at = filled[i] = filled.get(i, -1) + 1
                chances[i, at] = chance
            goodput = max(plain, float(self._forecast.goodputs(step, chances[None], np.zeros(1))[0]))
        return Plan(goodput, chances)

    def with_drafter(self, step: Step, best: Plan, name: str, price: float) -> Plan | None:
        """The best plan in which the drafter is asked, too; None if it is of use to nobody. `price`: of a row, in
        tokens."""
        cost = self._drafting.get(name)
        if cost is None or not cost.known:
            return None
        asked = np.zeros(len(step.turns), bool)
        for turns, _ in best.asks.values():
            asked |= turns
        if asked.all():  # two that cost time for one sequence do not pay
            return None
        chances, reading = self._offered(step, name)
        chances[asked] = 0.0
        return self._joined(step, best, name, price, chances, reading)

    def alone(self, step: Step, plain: float, name: str) -> Plan | None:
        """The best plan in which the drafter is asked, if there were no other drafts; None if it is of use to nobody.
        `plain`: the goodput without any."""
        nothing = Plan(plain, np.zeros((len(step.turns), self._longest)))
        return self.with_drafter(step, nothing, name, self._forecast.row_price(step, plain))

    def would_pay(self, step: Step, best: Plan, name: str, may: np.ndarray, rates: np.ndarray) -> bool:
        """Whether a drafter would pay for the turns that `may`, (turns,), if its tokens were right that often one after
        the other, (longest,)."""
        chances = rates.cumprod() * may[:, None]
        plan = self._joined(step, Plan(best.goodput, best.chances), name, 0.0, chances, np.zeros(len(step.turns)))
        return plan is not None and plan.goodput >= GAIN * best.goodput

    def best_drafts(self, step: Step) -> tuple[dict[int, Draft], list[Offer]]:
        """By turn the draft that is worth most; and each of those drafts' tokens that is worth anything, a draft's in
        their order."""
        price = self._forecast.row_price(step, self._forecast.plain_goodput(step))
        least = WORTHLESS * price
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
                expected = power = 1.0
                for chance in best:
                    if chance < least:
                        break
                    expected += chance
                    before, power = power, expected**EVEN
                    offers.append((before - power, i, chance))
        return picked, offers

    def floor(self, step: Step, plan: Plan) -> float:
        """The chance below which a token is not worth being drafted by those that the plan asks, let alone verified."""
        seconds = sum(self._drafting[name].predict(int(turns.sum())) for name, (turns, _) in plan.asks.items())
        asked = sum(int(turns.sum()) for turns, _ in plan.asks.values())
        if not asked:
            return 0.0
        return 0.5 * (plan.goodput * seconds / asked + self._forecast.row_price(step, plan.goodput))

    def _offered(self, step: Step, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What each turn may expect of a drafter, (turns, longest), and the seconds that reading costs it, (turns,)."""
        cost = self._drafting[name]
        may = [i for i, turn in enumerate(step.turns) if name in turn.backlog]
        chances = np.zeros((len(step.turns), self._longest))
        chances[may] = [self._acceptance.expected(step.turns[i].sequence.id, name) for i in may]
        limits = np.array([turn.limit for turn in step.turns])
        if limits.min() < self._longest:
            chances[self._lengths > limits[:, None]] = 0.0
        reading = np.zeros(len(step.turns))
        for i in may:
            turn = step.turns[i]
            if (rows := turn.backlog[name]) > 1:
                left = turn.sequence.params.max_tokens - turn.sequence.output_len
                steps = max(1, min(HORIZON, left // 2)) if rows > self._longest + 1 else 1
                reading[i] = max(0.0, cost.predict(rows) - cost.predict(1)) / steps
        return chances, reading

    def _joined(
        self, step: Step, best: Plan, name: str, price: float, chances: np.ndarray, reading: np.ndarray
    ) -> Plan | None:
        """`best` with those turns given to the drafter that gain by it, at the length that is best for all."""
        cost, lengths = self._drafting[name], self._lengths
        most = max(2, len(step.turns))
        token_context = cost.context_token * step.context / step.decoding
        a_row = (cost.predict(most) - cost.predict(1)) / (most - 1) + token_context
        # By turn and length: what the draft is worth beyond its rows, less what the turn has already, less its rows
        # of the draft's passes.
        value = np.maximum(0.0, chances - price).cumsum(axis=1)
        has = np.maximum(0.0, best.chances - price).sum(axis=1)
        least = has + best.goodput * reading
        given = (value > least[:, None] + best.goodput * a_row * lengths) & (chances > 0)  # (turns, lengths)
        counts = given.sum(axis=0)
        if not counts.any():
            return None
        passes = (cost.seconds(0, len(step.turns))[counts] + token_context * counts) * lengths
        drafting = np.where(counts > 0, passes + reading @ given, np.inf)
        # (lengths, turns, longest)
        joined = np.where(given.T[:, :, None], chances * self._within, best.chances)
        total = best.drafting + CAUTION * drafting
        goodputs = self._forecast.goodputs(step, joined, total)
        at = int(goodputs.argmax())
        asks = {**best.asks, name: (given[:, at], at + 1)}
        return Plan(float(goodputs[at]), joined[at], float(total[at]), asks)
