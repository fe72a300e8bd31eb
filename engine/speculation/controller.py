"""The controller: how many tokens to draft, sequence by sequence and step by step, "none" always among the choices.

It takes the lengths with the highest predicted goodput of the whole batch: expected committed tokens over predicted
seconds. Expectations come from acceptance that it watches, seconds from steps that it measured. The text never depends
on its choices, and its choices depend on what it was told alone, so it can be tested without a model or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.sequence import Sequence
from engine.speculation.acceptance import Acceptance
from engine.speculation.cost import DraftCost, RowCost
from engine.speculation.drafter import NO_DRAFT, Draft, shortened

GAIN = 1.03
"""Drafting must promise this multiple of plain decoding's goodput: predictions err, and plain decoding is safe."""
FIRST_RETRY, LAST_RETRY = 16, 1024
"""Steps after which a drafter that costs time and was switched off gets a trial; doubled after each that fails."""


PLAIN_EVERY = 100
"""Steps after which a plain step is due: what drafting is compared with has to be measured, too."""


@dataclass(slots=True)
class _Trials:
    """When a drafter that does not pay is tried again."""

    wait: int = FIRST_RETRY
    waited: int = 0

    def due(self) -> bool:
        self.waited += 1
        if self.waited < self.wait:
            return False
        self.waited, self.wait = 0, min(LAST_RETRY, 2 * self.wait)
        return True


@dataclass(slots=True)
class Controller:
    """`observe_*` tell it what happened, `limit` and `choose` ask it what to do."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    target: RowCost = field(default_factory=RowCost)
    _drafting: dict[str, DraftCost] = field(default_factory=dict)
    _trials: dict[str, _Trials] = field(default_factory=dict)

    def limit(self, drafter: str, sequences: list[Sequence], longest: int, rows: int) -> int:
        """How long drafts of a drafter that costs time should be, for all of `sequences`, before it is asked: 0 to
        `longest`. `rows`: of the step without any draft."""
        cost = self._drafting.get(drafter)
        if cost is None or not cost.known or not self.target.known:
            return longest
        chances = [self.acceptance.survival(sequence.id, drafter, 0, longest) for sequence in sequences]
        plain = len(sequences) / self.target.predict(rows)
        best, best_goodput = 0, GAIN * plain
        gained = 0.0
        for length in range(1, longest + 1):
            gained += sum(chance[length - 1] for chance in chances)
            seconds = self.target.predict(rows + length * len(sequences)) + cost.predict(length)
            goodput = (len(sequences) + gained) / seconds
            if goodput > best_goodput:
                best, best_goodput = length, goodput
        trials = self._trials.setdefault(drafter, _Trials())
        if best:
            trials.wait, trials.waited = FIRST_RETRY, 0
            return best
        return min(longest, 2) if trials.due() else 0

    def choose(self, drafts: Mapping[Sequence, Draft], decoding: int, rows: int) -> dict[Sequence, Draft]:
        """Of drafts that are there already, the tokens worth verifying. `rows`: of the step without any draft, of which
        `decoding` commit a token each.

        The likeliest tokens of all drafts go first; a draft's tokens never get likelier along it, so what is chosen is
        the beginning of each.
        """
        if not self.target.known or not drafts:
            return dict(drafts)
        if self.target.age(rows) > PLAIN_EVERY:
            return {}
        offers = sorted(
            (
                (-chance, order, sequence)
                for order, (sequence, draft) in enumerate(drafts.items())
                for chance in self.acceptance.survival(sequence.id, draft.drafter, draft.evidence, len(draft.tokens))
            ),
            key=lambda offer: offer[:2],
        )
        expected = float(decoding)
        best, best_goodput = 0, GAIN * expected / self.target.predict(rows)
        for count, (chance, _, _) in enumerate(offers, start=1):
            expected -= chance
            goodput = expected / self.target.predict(rows + count)
            if goodput > best_goodput:
                best, best_goodput = count, goodput
        lengths: dict[Sequence, int] = {}
        for _, _, sequence in offers[:best]:
            lengths[sequence] = lengths.get(sequence, 0) + 1
        return {sequence: shortened(drafts[sequence], length) for sequence, length in lengths.items()}

    def observe_step(self, rows: int, seconds: float) -> None:
        """A step's forward pass, sampling and verification took so long."""
        self.target.observe(rows, seconds)

    def observe_drafting(self, drafter: str, length: int, seconds: float) -> None:
        """A drafter that costs time took so long for drafts of up to `length` tokens."""
        self._drafting.setdefault(drafter, DraftCost()).observe(length, seconds)

    def observe_tokens(self, sequence: Sequence, draft: Draft, tokens: list[int]) -> None:
        """`tokens` came where `draft` was proposed, whether or not (all of) it was verified."""
        if draft is not NO_DRAFT:
            self.acceptance.observe(sequence.id, draft.drafter, draft, tokens)

    def release(self, sequence: Sequence) -> None:
        self.acceptance.release(sequence.id)
