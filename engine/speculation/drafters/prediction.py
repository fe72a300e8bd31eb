"""PredictionDrafter: drafts from what the client expects as the answer, edited or not (OpenAI: Predicted Outputs)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest

LONGEST_GRAM = 3
"""Tokens of the answer's end that are looked up in the prediction, and then fewer."""
NEAR = 8
"""A single token says little: it counts only this close behind the position where the answer left the prediction."""
TRUSTED = 4
"""Tokens in a row that must agree before a position is taken for where the answer is, and not for a coincidence."""
STRONGEST = 5


class PredictionDrafter:
    """Follows the request's `prediction_ids` from their beginning, and drafts what comes next, while the answer agrees.

    Where it disagrees, one token is taken to be replaced, and the text behind it is drafted. If that is wrong, too, the
    answer's last 3 tokens are looked up in the prediction, then 2, then 1 (only nearby): so it finds its way behind
    what was inserted, left out, or replaced by something longer. Of several positions the next one from where the
    answer last was in the prediction for certain counts, else the last one before. Where nothing is found, there is no
    draft.

    `evidence`: 0 for the guess that a token was replaced, else 1 to 6 by the number of tokens that agreed in a row, 1
    for none (the answer's beginning), then by powers of two. Drafts are as long as they may be at the beginning, else
    2n + 3 for n tokens that agree. A token of the answer costs a few lookups, however long the prediction is; memory
    is proportional to it, and what is looked up is indexed at the first disagreement.
    """

    name = "prediction"

    def __init__(self) -> None:
        self._followers: dict[str, _Follower] = {}

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """One Draft for each of `requests`; none without a prediction, or while the answer is nowhere in it."""
        return [self._draft(request.sequence, request.limit) for request in requests]

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's position and index."""
        self._followers.pop(sequence.id, None)

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        prediction = sequence.request.prediction_ids
        if not prediction:
            return NO_DRAFT
        follower = self._followers.get(sequence.id)
        if follower is None:
            follower = self._followers[sequence.id] = _Follower(prediction, sequence.prompt_len)
        follower.catch_up(sequence.tokens, sequence.prompt_len)
        position = follower.position
        if position is None or position >= len(prediction):
            return NO_DRAFT
        begun = sequence.output_len > 0
        length = min(limit, 2 * follower.agreed + 3) if begun else limit
        evidence = 0 if follower.guessed else 1 + min(follower.agreed.bit_length(), STRONGEST)
        return Draft(prediction[position : position + length], None, self.name, evidence)


def make(config: EngineConfig) -> PredictionDrafter:
    return PredictionDrafter()


@dataclass(slots=True)
class _Follower:
    """Where an answer is in its prediction."""

    prediction: tuple[int, ...]
    end: int
    """Tokens of the sequence that were followed."""
    position: int | None = 0
    """Where the prediction goes on; None while the answer is nowhere in it."""
    agreed: int = 0
    """Tokens before `position` that are the answer's last ones, as far as is known."""
    guessed: bool = False
    """Whether `position` is but a guess: that one token was replaced by another."""
    certain: int = 0
    """The last position that was no coincidence."""
    grams: list[dict[tuple[int, ...], list[int]]] = field(default_factory=list)
    """For each length, longest first: the positions behind an n-gram of the prediction, ascending."""

    def catch_up(self, tokens: list[int], prompt_len: int) -> None:
        for end in range(self.end, len(tokens)):
            position = self.position
            if position is not None and position < len(self.prediction) and self.prediction[position] == tokens[end]:
                self.position, self.agreed, self.guessed = position + 1, self.agreed + 1, False
            else:
                self._find(tokens[max(prompt_len, end + 1 - LONGEST_GRAM) : end + 1])
            if self.position is not None and self.agreed >= TRUSTED:
                self.certain = self.position
        self.end = len(tokens)

    def _find(self, recent: list[int]) -> None:
        """Align anew, by the answer's last tokens: what is behind them in the prediction, if they are there."""
        left, self.guessed = self.position, False
        if not self.grams:
            self.grams = [_index(self.prediction, length) for length in range(LONGEST_GRAM, 0, -1)]
        for length, positions in zip(range(LONGEST_GRAM, 0, -1), self.grams, strict=True):
            found = positions.get(tuple(recent[-length:])) if length <= len(recent) else None
            if found is None:
                continue
            # What is before the certain place has been said.
            next_ = bisect_left(found, self.certain + 1)
            if length > 1 or (next_ < len(found) and found[next_] <= self.certain + NEAR):
                self.position, self.agreed = found[min(next_, len(found) - 1)], length
                return
        # Just off the certain way: perhaps another token stands for this one.
        self.guessed = left is not None and left == self.certain
        self.position, self.agreed = (self.certain + 1 if self.guessed else None), 0


def _index(tokens: tuple[int, ...], length: int) -> dict[tuple[int, ...], list[int]]:
    positions: dict[tuple[int, ...], list[int]] = {}
    for end, gram in enumerate(zip(*(tokens[i:] for i in range(length)), strict=False), start=length):
        positions.setdefault(gram, []).append(end)
    return positions
