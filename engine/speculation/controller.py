"""The controller: who drafts how much, sequence by sequence and step by step, "none" always among the choices.

It takes what promises the highest goodput of the whole batch: expected committed tokens over predicted seconds.
Expectations come from acceptance that it watches (`acceptance`), seconds from passes that it measured (`cost`). The
text never depends on its choices, and its choices depend on what it was told alone, so it can be tested without a model
or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from engine.sequence import Sequence
from engine.speculation.acceptance import Acceptance
from engine.speculation.cost import RowCost
from engine.speculation.drafter import Draft, DraftRequest, shortened
from engine.speculation.goodput import EVEN, best_first, worth
from engine.speculation.trials import Trials

GAIN = 1.02
"""Drafting must promise this multiple of plain decoding's goodput, and a drafter that costs time this multiple of what
there is without it: predictions err, and a difference of a percent is noise."""
CAUTION = 1.1
"""What rows and drafts are taken to cost, as a multiple of what they are predicted to: a token that just about pays is
not worth its risk."""
SURE = 2.0
"""A comparison of costs may be off by so many of its standard deviations."""
PLAIN_EVERY = 64
"""Steps after which a plain one is due where drafting is ahead of it by less than that."""
MOST_LIKELY = 0.95
"""Acceptance that a drafter could have at best. One that would not pay even so is not tried."""
TRIED = 2
"""Most tokens of a trial."""
HORIZON = 32
"""Steps over which reading a text for the first time should pay off, less where the answer ends sooner."""
SMOOTHING = 0.05
"""Weight of a step's overhead against what is known of it."""
WORTHLESS = 0.5
"""A token is not looked at whose chance is below this multiple of what its row costs at plain decoding's goodput."""
REST, NEARLY = 7, 0.97
"""Steps in which a drafter is not thought about whose goodput alone is less than so much of plain decoding's."""
SEEN = 16
"""First tokens of a drafter after which its acceptance is known, and not its prior."""
_ROWS = ""
"""What is tried where the doubt is in what rows cost, and not in a drafter."""


@dataclass(slots=True)
class Turn:
    """A sequence of a step that may be drafted for."""

    sequence: Sequence
    limit: int
    """Most tokens, at least 1."""
    drafts: list[Draft] = field(default_factory=list)
    """Proposals, none of them empty: those that cost nothing before `ask`, the others before `choose`."""
    backlog: dict[str, int] = field(default_factory=dict)
    """Drafters that cost time and may draft for it, and the rows that each would have to read first."""
    asked: dict[str, int] = field(default_factory=dict)
    """Tokens that `ask` wants of a drafter."""


@dataclass(slots=True)
class Step:
    """What a step is before drafts are chosen for it."""

    rows: int
    """Without any draft."""
    decoding: int
    """Of them, those that commit a token each; the others are prompts'."""
    turns: list[Turn]
    context: int = 0
    """Tokens in the KV cache of those that decode."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be verified, and what that promises in tokens per second; 0 where nothing was predicted."""

    drafts: dict[Sequence, Draft]
    goodput: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """A way to go through a step: `chances` of what each turn would get, (turns, longest); `asks` by costly drafter, as
    (which turns, how many tokens); `drafting` seconds for them."""

    goodput: float
    chances: np.ndarray
    drafting: float = 0.0
    asks: Mapping[str, tuple[np.ndarray, int]] = field(default_factory=dict)


class Controller:
    """In each step `ask` says whom to ask that costs time, `choose` what to verify; `observe_*` tell what came of it.

    `longest`: the most tokens of a draft. `priors`: by drafter, how often its first token is taken to be right until
    that was seen.
    """

    def __init__(self, longest: int = 8, priors: Mapping[str, float] | None = None) -> None:
        self.acceptance = Acceptance(longest, priors)
        self.target = RowCost()
        self.drafting: dict[str, RowCost] = {}
        """Passes of the drafters that cost time."""
        self._trials = Trials()
        self._resting: dict[tuple[str, int], int] = {}  # steps, by drafter and load
        self._hoping: dict[tuple[str, int], int] = {}  # the same
        self._longest = longest
        self._lengths = np.arange(1, longest + 1)
        self._within = (self._lengths <= self._lengths[:, None])[:, None, :]  # (lengths, 1, positions)
        self._overhead = self._drawing = 0.0  # seconds of a step beside its passes; of a token's drawing
        self._token = 0.0  # seconds that plain decoding would have taken for a token of the last step
        self._reading = 1.0  # what a step with prompts takes, as a multiple of one with as many rows to verify
        self._turns: dict[Sequence, Turn] = {}

    def ask(self, step: Step) -> dict[str, list[DraftRequest]]:
        """Which drafters that cost time to ask, for which sequences and lengths."""
        names = dict.fromkeys(name for turn in step.turns for name in turn.backlog)
        if not names:
            return {}
        if not self.target.known:
            return {name: self._requests(step, name, None, self._longest, 0.0) for name in names}
        load = step.decoding.bit_length()
        open_names = [name for name in names if not self._rests((name, load))]
        if not open_names:
            return {}
        best = self._without(step)
        empty = not best.chances.any()
        price = self._row_price(step, best.goodput)
        alone: dict[str, _Plan | None] | None = None
        advances: dict[str, tuple[np.ndarray, int]] = {}
        while open_names:
            plans = {name: self._with(step, best, name, price) for name in open_names}
            alone = plans if alone is None and empty else alone
            name, plan = max(plans.items(), key=lambda item: item[1].goodput if item[1] else 0.0)
            if plan is None or plan.goodput < GAIN * best.goodput:
                break
            open_names.remove(name)
            self._trials.won((name, load))
            if not self._new(name):
                best = plan
            elif (advance := self._advance(step, name, *plan.asks[name])) is not None:
                advances[name] = advance
        longer = {name: (turns, self._lengthened(step, best, name, turns, n)) for name, (turns, n) in best.asks.items()}
        asks = {**longer, **advances}
        for name in open_names:
            trial = self._trial(step, best, name, load) if not asks else None
            if trial is not None:
                asks[name] = trial
            elif not self._hopeful(step, name, alone):
                self._resting[name, load] = REST
        floor = self._floor(step, best)
        return {name: self._requests(step, name, turns, length, floor) for name, (turns, length) in asks.items()}

    def choose(self, step: Step) -> Choice:
        """Of the drafts that are there, the tokens worth verifying.

        Each sequence's best draft, and of all those the likeliest tokens first; a draft's tokens never get likelier
        along it, so what is chosen is the beginning of each.
        """
        self._turns = {turn.sequence: turn for turn in step.turns}
        if not self.target.known:
            return Choice({turn.sequence: turn.drafts[0] for turn in step.turns if turn.drafts})
        asked = {name for turn in step.turns for name in turn.asked}
        spent = sum(self._drafting_seconds(step, name) for name in sorted(asked))
        if not step.decoding:
            return Choice({})
        picked, offers = self._best_drafts(step)
        seconds = self._seconds(step, len(offers))
        plain_seconds = float(seconds[0]) + spent
        plain = step.decoding / plain_seconds
        self._token = float(seconds[0]) / step.decoding
        whole = self.target.predict(step.rows, step.context) * (self._reading if step.rows > step.decoding else 1.0)
        prompts = whole + self._overhead - float(seconds[0])
        offers.sort()
        count, tokens, goodput = 0, float(step.decoding), plain
        if offers:
            gained = -np.array([offer[0] for offer in offers])
            rows = CAUTION * (seconds[1:] - seconds[0])
            promised = worth(step.decoding, gained.cumsum()) / (plain_seconds + rows)
            count = int(promised.argmax()) + 1
            goodput = float(promised[count - 1])
            if not self._pays(step, goodput / plain, count, plain_seconds):
                count = 0
        taken = offers[:count]
        if count:
            # Those who are behind count for more, but not for more than what a row brings elsewhere.
            tokens += sum(chance for _, _, chance in taken)
            row = CAUTION * float(seconds[count] - seconds[count - 1])
            least = row * tokens / (plain_seconds + float(rows[count - 1]))
            taken = [offer for offer in taken if offer[2] >= least]
            count, tokens = len(taken), step.decoding + sum(chance for _, _, chance in taken)
        lengths: dict[int, int] = {}
        for _, i, _ in taken:
            lengths[i] = lengths.get(i, 0) + 1
        chosen = {step.turns[i].sequence: shortened(picked[i], length) for i, length in lengths.items()}
        told = self._told(tokens, float(seconds[count]) + spent + prompts)
        return Choice(chosen, told, self._told(step.decoding, float(seconds[0]) + prompts))

    def observe_step(self, rows: int, seconds: float, context: int = 0, prompts: bool = False) -> None:
        """The target's pass over so many rows and tokens of context took so long. `prompts`: rows of prompts are among
        them, most of which need no logits. So it says nothing of what rows cost that are verified."""
        if not prompts:
            self.target.observe(rows, seconds, context)
        elif self.target.known:
            self._reading += SMOOTHING * (seconds / self.target.predict(rows, context) - self._reading)
        self._trials.earn(seconds)

    def observe_overhead(self, seconds: float, drawing: float, tokens: int) -> None:
        """What the step took beside its passes, and of that the drawing of so many tokens."""
        self._overhead += SMOOTHING * (seconds - drawing - self._overhead)
        if tokens:
            self._drawing += SMOOTHING * (drawing / tokens - self._drawing)

    def observe_drafting(self, drafter: str, passes: Seq[int], seconds: float, context: int = 0) -> None:
        """A drafter that costs time took so long for passes of so many rows, over sequences of so many tokens."""
        if passes:
            self.drafting.setdefault(drafter, RowCost()).observe_passes(passes, seconds, context * len(passes))
            if self._new(drafter):
                self._trials.advanced(seconds)

    def observe_tokens(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """The tokens that came where the last step's drafts of the sequence were proposed, verified or not."""
        turn = self._turns.get(sequence)
        if turn is None:
            self.acceptance.observe(sequence.id, (), tokens, {})
            return
        if turn.asked:
            for draft in turn.drafts:
                if draft.drafter in turn.asked and self._new(draft.drafter):
                    self._trials.advanced(-self._token * _agreed(draft.tokens, tokens[:-1]))
        self.acceptance.observe(sequence.id, turn.drafts, tokens, turn.asked)

    def release(self, sequence: Sequence) -> None:
        self.acceptance.release(sequence.id)
        self._turns.pop(sequence, None)

    def _rests(self, subject: tuple[str, int]) -> bool:
        """Whether a drafter that would not pay a few steps ago is not even thought about in this one."""
        left = self._resting.get(subject, 0)
        if left:
            self._resting[subject] = left - 1
            self._trials.wait(subject)
        return left > 0

    def _hopeful(self, step: Step, name: str, plans: Mapping[str, _Plan | None] | None) -> bool:
        """Whether a drafter would be asked if there were no other drafts: those come and go with every token. `plans`:
        with each drafter, if there are none. What comes out holds for some steps."""
        subject = (name, step.decoding.bit_length())
        if left := self._hoping.get(subject, 0):
            self._hoping[subject] = left - 1
            return True
        plain = step.decoding / float(self._seconds(step, 0)[0])
        if plans is None:
            nothing = _Plan(plain, np.zeros((len(step.turns), self._longest)))
            plan = self._with(step, nothing, name, self._row_price(step, plain))
        else:
            plan = plans[name]
        hopeful = plan is not None and plan.goodput > NEARLY * plain
        if hopeful:
            self._hoping[subject] = REST
        return hopeful

    def _without(self, step: Step) -> _Plan:
        """The best that can be done with the drafts that are there."""
        plain = step.decoding / float(self._seconds(step, 0)[0])
        chances = np.zeros((len(step.turns), self._longest))
        goodput, offers = plain, self._best_drafts(step)[1]
        if offers:
            filled: dict[int, int] = {}
            for _, i, chance in offers:
                at = filled[i] = filled.get(i, -1) + 1
                chances[i, at] = chance
            goodput = max(plain, float(self._goodputs(step, chances[None], np.zeros(1))[0]))
        return _Plan(goodput, chances)

    def _with(self, step: Step, best: _Plan, name: str, price: float) -> _Plan | None:
        """The best plan in which the drafter is asked, too; None if it is of use to nobody."""
        cost = self.drafting.get(name)
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

    def _offered(self, step: Step, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What each turn may expect of a drafter, (turns, longest), and the seconds that reading costs it, (turns,)."""
        cost = self.drafting[name]
        may = [i for i, turn in enumerate(step.turns) if name in turn.backlog]
        chances = np.zeros((len(step.turns), self._longest))
        chances[may] = [self.acceptance.expected(step.turns[i].sequence.id, name) for i in may]
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
        self, step: Step, best: _Plan, name: str, price: float, chances: np.ndarray, reading: np.ndarray
    ) -> _Plan | None:
        """`best` with those turns given to the drafter that gain by it, at the length that is best for all."""
        cost, lengths = self.drafting[name], self._lengths
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
        goodputs = self._goodputs(step, joined, total)
        at = int(goodputs.argmax())
        asks = {**best.asks, name: (given[:, at], at + 1)}
        return _Plan(float(goodputs[at]), joined[at], float(total[at]), asks)

    def _advance(self, step: Step, name: str, turns: np.ndarray, length: int) -> tuple[np.ndarray, int] | None:
        """Of what is wanted of a new drafter, as much as it may cost: first those turns that it has least to read of,
        and one more at most than were seen of it, as its cost may be another than it seemed."""
        budget = self._budget(step)
        wanted = sorted(np.flatnonzero(turns).tolist(), key=lambda i: step.turns[i].backlog[name])
        most, count = min(len(wanted), 1 + int(self.acceptance.trials(name))), 0
        if self._asking(step, name, wanted[:1], length) > budget:
            length = min(TRIED, length)
        while count < most and self._asking(step, name, wanted[: count + 1], length) <= budget:
            count += 1
        given = np.zeros_like(turns)
        given[wanted[:count]] = True
        return (given, length) if count else None

    def _new(self, name: str) -> bool:
        """Whether little more is known of a drafter than its prior."""
        return self.acceptance.trials(name) < SEEN

    def _budget(self, step: Step) -> float:
        """Seconds that new drafters may cost in this step."""
        return self._trials.advance(float(self._seconds(step, 0)[0]))

    def _trial(self, step: Step, best: _Plan, name: str, load: int) -> tuple[np.ndarray, int] | None:
        """Turns and length of a trial of a drafter that does not pay, as far as is known, if one is due."""
        cost = self.drafting.get(name)
        if cost is None or not cost.known:
            return None
        may = np.array([name in turn.backlog for turn in step.turns])
        small = np.array([turn.backlog.get(name, 0) <= self._longest + 1 for turn in step.turns])
        turns = may & small if (may & small).any() else may & (np.cumsum(may) <= 1)
        length = min(TRIED, self._longest)
        loss = self._asking(step, name, np.flatnonzero(turns).tolist(), length)
        if not self._trials.ready((name, load), loss) or (self._new(name) and loss > self._budget(step)):
            return None
        # Where the drafter may pay as far as is known, and too little is, trials go on; else they get rarer.
        likely = self._hoped(step, best, name, may, self.acceptance.at_best(name))
        possible = likely or self._hoped(step, best, name, may, np.full(self._longest, MOST_LIKELY))
        self._trials.done((name, load), loss if possible else 0.0, rarer=not likely)
        return (turns, length) if possible else None

    def _lengthened(self, step: Step, best: _Plan, name: str, turns: np.ndarray, length: int) -> int:
        """The length to ask for: now and then one more than pays as far as is known, since of places that are not
        drafted for nothing more will be known."""
        if length >= self._longest:
            return length
        count, subject = int(turns.sum()), (f"{name} {length + 1}", step.decoding.bit_length())
        loss = self.drafting[name].predict(count)
        if not self._trials.ready(subject, loss):
            return length
        hoped = np.where(self._lengths > length, self.acceptance.at_best(name), 1.0).cumprod()
        possible = best.chances[turns, length - 1].sum() * hoped[length] > best.goodput * loss
        self._trials.done(subject, loss if possible else 0.0, rarer=True)
        return length + int(possible)

    def _hoped(self, step: Step, best: _Plan, name: str, may: np.ndarray, rates: np.ndarray) -> bool:
        """Whether a drafter would pay if its tokens were right that often, one after the other."""
        chances = rates.cumprod() * may[:, None]
        plan = self._joined(step, _Plan(best.goodput, best.chances), name, 0.0, chances, np.zeros(len(step.turns)))
        return plan is not None and plan.goodput >= GAIN * best.goodput

    def _best_drafts(self, step: Step) -> tuple[dict[int, Draft], list[tuple[float, int, float]]]:
        """By turn the draft that is worth most; and (minus the gain, turn, chance) of each of those drafts' tokens that
        is worth anything, a draft's in their order. Gains are those of `goodput.gains`."""
        price = self._row_price(step, step.decoding / float(self._seconds(step, 0)[0]))
        least = WORTHLESS * price
        picked: dict[int, Draft] = {}
        offers: list[tuple[float, int, float]] = []
        for i, turn in enumerate(step.turns):
            best, most = None, 0.0
            for draft in turn.drafts:
                chances = self.acceptance.survival(turn.sequence.id, draft)
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

    def _goodputs(self, step: Step, chances: np.ndarray, drafting: np.ndarray) -> np.ndarray:
        """The highest goodput of each of some plans: (plans, turns, longest) chances, (plans,) seconds."""
        tokens = worth(step.decoding, best_first(chances))
        cautious = _cautious(self._seconds(step, tokens.shape[1]))[1:]
        goodputs: np.ndarray = (tokens / (cautious + drafting[:, None])).max(axis=1)
        return goodputs

    def _seconds(self, step: Step, drafted: int) -> np.ndarray:
        """Seconds of the step with 0, 1, ... `drafted` rows of drafts: (drafted + 1,).

        Rows of prompts, whose time has to be spent anyhow, count for what more rows cost on top of them, but not
        themselves: else a long step would make drafts look cheap that are not.
        """
        seconds = self.target.seconds(step.rows, step.rows + drafted, step.context) + self._overhead
        if step.rows > step.decoding:
            seconds -= self.target.predict(step.rows) - self.target.predict(step.decoding)
        return seconds

    def _row_price(self, step: Step, goodput: float) -> float:
        """Tokens that the seconds of one more row are worth."""
        more = max(4, len(step.turns))
        seconds = self.target.seconds(step.rows, step.rows + more, step.context)
        return CAUTION * goodput * float(seconds[-1] - seconds[0]) / more

    def _floor(self, step: Step, plan: _Plan) -> float:
        """The chance below which a token is not worth being drafted by those that the plan asks, let alone verified."""
        seconds = sum(self.drafting[name].predict(int(turns.sum())) for name, (turns, _) in plan.asks.items())
        asked = sum(int(turns.sum()) for turns, _ in plan.asks.values())
        return 0.5 * (plan.goodput * seconds / asked + self._row_price(step, plan.goodput)) if asked else 0.0

    def _requests(
        self, step: Step, name: str, turns: np.ndarray | None, length: int, floor: float
    ) -> list[DraftRequest]:
        requests = []
        for i, turn in enumerate(step.turns):
            if name in turn.backlog and (turns is None or turns[i]):
                turn.asked[name] = min(turn.limit, length)
                requests.append(DraftRequest(turn.sequence, turn.asked[name], floor))
        return requests

    def _drafting_seconds(self, step: Step, name: str) -> float:
        """Of the drafts that `ask` wanted of a drafter."""
        turns = [i for i, turn in enumerate(step.turns) if name in turn.asked]
        return self._asking(step, name, turns, max(step.turns[i].asked[name] for i in turns))

    def _asking(self, step: Step, name: str, turns: Seq[int], length: int) -> float:
        """Seconds that drafts of such a length for these turns take, with all that is to be read before."""
        cost = self.drafting.get(name)
        if cost is None or not cost.known:
            return 0.0
        context = step.context * len(turns) // step.decoding
        rows = sum(step.turns[i].backlog[name] for i in turns)
        return cost.predict(rows, context) + (length - 1) * cost.predict(len(turns), context)

    def _pays(self, step: Step, gain: float, count: int, plain_seconds: float) -> bool:
        """Whether drafting is chosen that promises `gain` times plain decoding's goodput with `count` rows more."""
        subject = (_ROWS, step.decoding.bit_length())
        old = self.target.age(step.rows) > PLAIN_EVERY
        if gain >= GAIN:
            self._trials.won(subject)
            return not old or gain > 1 + SURE * self.target.uncertainty(step.rows, step.rows + count, step.context)
        loss = max(0.0, 1 - gain) * plain_seconds
        if not self._trials.ready(subject, loss):
            return False
        possible = gain * (1 + SURE * self.target.uncertainty(step.rows, step.rows + count, step.context)) >= GAIN
        self._trials.done(subject, loss if possible else 0.0, rarer=True)
        return possible

    def _told(self, tokens: float, seconds: float) -> float:
        return tokens / (seconds + tokens * self._drawing) if tokens else 0.0


def _agreed(drafted: Seq[int], tokens: Seq[int]) -> int:
    """How many of the drafted tokens came."""
    return next(
        (i for i, (one, other) in enumerate(zip(drafted, tokens, strict=False)) if one != other),
        min(len(drafted), len(tokens)),
    )


def _cautious(seconds: np.ndarray) -> np.ndarray:
    """Seconds of 0, 1, ... drafted rows, where those rows are taken to cost a little more than they do."""
    cautious: np.ndarray = seconds[0] + CAUTION * (seconds - seconds[0])
    return cautious
