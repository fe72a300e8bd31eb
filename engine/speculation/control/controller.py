"""The controller: who drafts how much, sequence by sequence and step by step, "none" always among the choices.

It takes what promises the highest goodput of the whole batch: expected committed tokens over predicted seconds.
Expectations come from acceptance that it watches (`acceptance`), seconds from passes that it measured (`cost`,
`forecast`); `plans` are the ways to go through a step, and `exploration` is what is done only to find out. The text
never depends on its choices, and its choices depend on what it was told alone, so it can be tested without a model or a
clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.acceptance import Acceptance
from pilotfish.engine.speculation.control.backoff import MANY, Naps
from pilotfish.engine.speculation.control.candidates import Choice, Step, Turn
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.control.exploration import NEARLY, Exploration
from pilotfish.engine.speculation.control.forecast import CAUTION, Forecast
from pilotfish.engine.speculation.control.goodput import goodputs
from pilotfish.engine.speculation.control.plans import GAIN, Offer, Plan, Planner
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, shortened


class Controller:
    """In each step `ask` says whom to ask that costs time, `choose` what to verify; `observe_*` tell what came of it.

    `longest`: the most tokens of a draft. `priors`: by drafter, how often its first token is taken to be right until
    that was seen. `target` and `drafting` may be calibrated before the first step.
    """

    def __init__(self, longest: int = 8, priors: Mapping[str, float] | None = None) -> None:
        self.acceptance = Acceptance(longest, priors)
        self.target = RowCost()
        self.drafting: dict[str, RowCost] = {}
        """Passes of the drafters that cost time."""
        self._forecast = Forecast(self.target, self.drafting)
        self._planner = Planner(self.acceptance, self._forecast, self.drafting)
        self._exploration = Exploration(self.acceptance, self._forecast, self._planner, self.target, self.drafting)
        self._naps = Naps()
        self._longest = longest
        self._promised = (0, 1.0, 0.0)  # of the last step: load, multiple of plain goodput, plain seconds
        self._token = 0.0  # seconds that plain decoding would have taken for a token of the last step
        self._turns: dict[Sequence, Turn] = {}

    def sleeps(self, step: Step) -> bool:
        """Whether the step is not to be drafted for at all, since to find out what for takes more than it brings."""
        if not step.turns or step.decoding < MANY:
            return False
        new = any(turn.sequence.output_len <= 1 for turn in step.turns)
        if not self._naps.sleeps(step.decoding.bit_length(), new):
            return False
        self._turns = {}
        return True

    def ask(self, step: Step) -> dict[str, list[DraftRequest]]:
        """Which drafters that cost time to ask, for which sequences and lengths."""
        names = dict.fromkeys(name for turn in step.turns for name in turn.backlog)
        if not names:
            return {}
        if not self.target.known:
            return {name: _requests(step, name, range(len(step.turns)), self._longest, 0.0) for name in names}
        exploration, load = self._exploration, step.decoding.bit_length()
        open_names = [name for name in names if not exploration.rests(name, load)]
        if not open_names:
            return {}
        best = self._planner.without(step)
        empty = not any(best.chances)
        price = self._forecast.row_price(step, best.goodput)
        alone: dict[str, Plan | None] | None = None
        advances: dict[str, tuple[list[int], int]] = {}
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
            elif (advance := exploration.advance(step, name, *plan.asks[name])) is not None:
                advances[name] = advance
        longer = {name: (turns, exploration.lengthened(best, name, load)) for name, (turns, _) in best.asks.items()}
        asks = {**longer, **advances}
        for name in open_names:
            trial = exploration.trial(step, best, name, load) if not asks else None
            if trial is not None:
                asks[name] = trial
            else:
                exploration.rest_unless_hopeful(step, name, load, alone)
        floor = self._planner.floor(step, best)
        return {name: _requests(step, name, turns, length, floor) for name, (turns, length) in asks.items()}

    def choose(self, step: Step) -> Choice:
        """Of the drafts that are there, the tokens worth verifying.

        Each sequence's best draft, and of all those the likeliest tokens first; a draft's tokens never get likelier
        along it, so what is chosen is the beginning of each.
        """
        self._turns = {turn.sequence: turn for turn in step.turns}
        if not self.target.known:
            return Choice({turn.sequence: turn.drafts[0] for turn in step.turns if turn.drafts})
        spent = self._forecast.drafting_seconds(step)
        if not step.decoding:
            return Choice({})
        picked, offers = self._planner.best_drafts(step)
        seconds = self._forecast.seconds(step, len(offers))
        plain = seconds[0]
        self._token = plain / step.decoding
        taken = self._worth_verifying(step, offers, seconds, plain + spent) if offers else []
        lengths: dict[int, int] = {}
        for _, i, _ in taken:
            lengths[i] = lengths.get(i, 0) + 1
        chosen = {step.turns[i].sequence: shortened(picked[i], length) for i, length in lengths.items()}
        tokens = step.decoding + sum(chance for _, _, chance in taken)
        prompts = self._forecast.prompt_seconds(step, plain)
        took = seconds[len(taken)] + spent
        self._promised = (step.decoding.bit_length(), tokens / took * plain / step.decoding, plain)
        goodput = self._forecast.told(tokens, took + prompts)
        return Choice(chosen, goodput, self._forecast.told(step.decoding, plain + prompts))

    def observe_thinking(self, seconds: float) -> None:
        """What `ask`, `choose` and the drafters that cost nothing took for the last step."""
        load, gain, plain = self._promised
        if plain:
            self._naps.awake(load, gain, seconds / plain)
            self._promised = (0, 1.0, 0.0)

    def observe_step(self, rows: int, seconds: float, context: int = 0, prompts: bool = False) -> None:
        """The target's pass over so many rows and tokens of context took so long. `prompts`: rows of prompts are among
        them, most of which need no logits."""
        self._forecast.observe_step(rows, seconds, context, prompts)
        self._exploration.passed(seconds)

    def observe_overhead(self, seconds: float, drawing: float, tokens: int) -> None:
        """What the step took beside its passes, and of that the drawing of so many tokens."""
        self._forecast.observe_overhead(seconds, drawing, tokens)

    def observe_drafting(self, drafter: str, passes: Seq[int], seconds: float, context: int = 0) -> None:
        """A drafter that costs time took so long for passes of so many rows, over sequences of so many tokens."""
        if passes:
            self._forecast.observe_drafting(drafter, passes, seconds, context)
            self._exploration.drafted(drafter, seconds)

    def observe_tokens(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """The tokens that came where the last step's drafts of the sequence were proposed, verified or not."""
        turn = self._turns.get(sequence)
        if turn is None:
            self.acceptance.observe(sequence.id, (), tokens, {})
            return
        if turn.asked:
            self._exploration.agreed(turn, tokens, self._token)
        self.acceptance.observe(sequence.id, turn.drafts, tokens, turn.asked)

    def release(self, sequence: Sequence) -> None:
        self.acceptance.release(sequence.id)
        self._turns.pop(sequence, None)

    def _worth_verifying(
        self, step: Step, offers: list[Offer], seconds: list[float], plain_seconds: float
    ) -> list[Offer]:
        """Those of the offers that are taken, best first. `seconds` of the step's pass by how many are; without any the
        step takes `plain_seconds`."""
        offers.sort()
        cautious = [plain_seconds + CAUTION * (taken - seconds[0]) for taken in seconds]
        plain, *promised = goodputs(step.decoding, [-offer[0] for offer in offers], cautious)
        gain = max(promised) / plain
        count = promised.index(max(promised)) + 1
        if not self._exploration.pays(step, gain, count, plain_seconds):
            return []
        # Those who are behind count for more, but not for more than what a row brings elsewhere.
        taken = offers[:count]
        tokens = step.decoding + sum(chance for _, _, chance in taken)
        row = cautious[count] - cautious[count - 1]
        least = row * tokens / cautious[count]
        return [offer for offer in taken if offer[2] >= least]


def _requests(step: Step, name: str, turns: Iterable[int], length: int, floor: float) -> list[DraftRequest]:
    """Of one drafter, for those of these turns that may have it; noted in the turns."""
    requests = []
    for i in turns:
        turn = step.turns[i]
        if name in turn.backlog:
            turn.asked[name] = min(turn.limit, length)
            requests.append(DraftRequest(turn.sequence, turn.asked[name], floor))
    return requests
