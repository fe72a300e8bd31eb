"""PredictionDrafter: drafts from the answer that the client expects (OpenAI: Predicted Outputs)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest

LONGEST_GRAM = 3
"""Number of the answer's last tokens that are looked up in the prediction first; then fewer."""
NEAR = 8
"""A single matching token is weak evidence: it counts only this close after the last certain position."""
TRUSTED = 4
"""Tokens in a row that must agree before a position is certain, and not a coincidence."""
STRONGEST = 5


class PredictionDrafter:
    """Follows the request's `prediction_ids` from their beginning, and drafts what comes next, while the answer agrees.

    Where it disagrees, one token is assumed to be replaced, and the text after it is drafted. If that is wrong, too,
    the answer's last 3 tokens are looked up in the prediction, then 2, then 1 (only nearby), which recovers from
    insertions, deletions and longer replacements. Of several positions the next one after the last certain position
    counts, else the last one before it. Where nothing is found, there is no draft.

    `evidence`: 0 for the guess that a token was replaced, else 1 to 6 by the number of tokens that agreed in a row, 1
    for none (the answer's beginning), then by powers of two. Drafts have the full length at the beginning, else 2n + 3
    tokens for n that agree. A token of the answer costs a few lookups, however long the prediction is; memory is
    proportional to it, and its index is made at the first disagreement.
    """

    name = "prediction"

    def __init__(self) -> None:
        self._followers: dict[str, _Follower] = {}

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty without a prediction, or while the answer is not in it."""
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
    """The position of an answer in its prediction."""

    prediction: tuple[int, ...]
    end: int
    """Number of tokens of the sequence that were followed."""
    position: int | None = 0
    """Position in the prediction of the expected next token; None while the answer is not in it."""
    agreed: int = 0
    """Known number of tokens before `position` that are the answer's last ones."""
    guessed: bool = False
    """Whether `position` is the guess that one token was replaced."""
    certain: int = 0
    """The last position that was no coincidence."""
    grams: list[dict[tuple[int, ...], list[int]]] = field(default_factory=list)
    """For each length, longest first: the positions after each n-gram of the prediction, ascending."""

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
        """Find the position again, by looking up the answer's last tokens in the prediction."""
        left, self.guessed = self.position, False
        if not self.grams:
            self.grams = [_index(self.prediction, length) for length in range(LONGEST_GRAM, 0, -1)]
        for length, positions in zip(range(LONGEST_GRAM, 0, -1), self.grams, strict=True):
            found = positions.get(tuple(recent[-length:])) if length <= len(recent) else None
            if found is None:
                continue
            # What is before the certain position was in the answer already.
            next_ = bisect_left(found, self.certain + 1)
            if length > 1 or (next_ < len(found) and found[next_] <= self.certain + NEAR):
                self.position, self.agreed = found[min(next_, len(found) - 1)], length
                return
        # At the first disagreement after a certain position: perhaps one token was replaced.
        self.guessed = left is not None and left == self.certain
        self.position, self.agreed = (self.certain + 1 if self.guessed else None), 0


def _index(tokens: tuple[int, ...], length: int) -> dict[tuple[int, ...], list[int]]:
    positions: dict[tuple[int, ...], list[int]] = {}
    for end, gram in enumerate(zip(*(tokens[i:] for i in range(length)), strict=False), start=length):
        positions.setdefault(gram, []).append(end)
    return positions
