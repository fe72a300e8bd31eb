"""The speculator asks each sequence's drafters for a draft of a sensible length, and watches what comes of it."""

from __future__ import annotations

import time
from collections import defaultdict

from engine.sequence import Sequence
from engine.speculation.controller import Controller
from engine.speculation.drafter import NO_DRAFT, Draft, Drafter, DraftRequest


class Speculator:
    """Takes the first proposal of each sequence's drafters: at most `num_draft_tokens`, less where answer or context
    end sooner, and as many as the controller finds worth it; all of them if there is no controller."""

    def __init__(
        self, drafters: list[Drafter], num_draft_tokens: int, max_model_len: int, controller: Controller | None
    ) -> None:
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._num_draft_tokens = num_draft_tokens
        self._max_model_len = max_model_len
        self._controller = controller
        self._proposed: dict[Sequence, Draft] = {}  # in this step, before the controller's choice

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._drafters)

    def draft(self, sequences: list[Sequence], other_rows: int = 0) -> dict[Sequence, Draft]:
        """Drafts for those of `sequences`, all of which decode in the next step, that have one. The step has
        `other_rows` besides, for prompts."""
        waiting: list[tuple[DraftRequest, tuple[str, ...]]] = []
        for sequence in sequences:
            # Verification commits one token more than are drafted.
            left = min(sequence.params.max_tokens - sequence.output_len, self._max_model_len - len(sequence.tokens)) - 1
            limit = min(self._num_draft_tokens, left)
            if sequence.drafters and limit > 0:
                waiting.append((DraftRequest(sequence, limit), sequence.drafters))
        rows = len(sequences) + other_rows
        self._proposed = {}
        while waiting:
            waiting = self._ask_next(waiting, rows)
        if self._controller is None or not self._proposed:
            return dict(self._proposed)
        return self._controller.choose(self._proposed, len(sequences), rows)

    def observe_step(self, rows: int, seconds: float) -> None:
        """The last step had so many rows and took the target so long."""
        if self._controller is not None:
            self._controller.observe_step(rows, seconds)

    def observe_tokens(self, sequence: Sequence, tokens: list[int]) -> None:
        """The target's tokens at the places that were last drafted for."""
        if self._controller is not None:
            self._controller.observe_tokens(sequence, self._proposed.get(sequence, NO_DRAFT), tokens)

    def release(self, sequence: Sequence) -> None:
        for drafter in self._drafters.values():
            drafter.release(sequence)
        if self._controller is not None:
            self._controller.release(sequence)
        self._proposed.pop(sequence, None)

    def _ask_next(
        self, waiting: list[tuple[DraftRequest, tuple[str, ...]]], rows: int
    ) -> list[tuple[DraftRequest, tuple[str, ...]]]:
        """Ask the first drafter of each request, and return those without a proposal that have others left. One that
        costs time comes when all are asked that do not, so that it has all of its requests at once."""
        turns: dict[str, list[tuple[DraftRequest, tuple[str, ...]]]] = defaultdict(list)
        for request, names in waiting:
            turns[names[0]].append((request, names))
        free = {name: turn for name, turn in turns.items() if self._drafters[name].free}
        left = [item for name, turn in turns.items() if free and name not in free for item in turn]
        for name, turn in (free or turns).items():
            drafts = self._ask(self._drafters[name], [request for request, _ in turn], rows)
            for (request, names), draft in zip(turn, drafts, strict=True):
                if draft.tokens:
                    self._proposed[request.sequence] = draft
                elif names[1:]:
                    left.append((request, names[1:]))
        return left

    def _ask(self, drafter: Drafter, asked: list[DraftRequest], rows: int) -> list[Draft]:
        if drafter.free or self._controller is None:
            return drafter.propose(asked)
        sequences = [request.sequence for request in asked]
        longest = self._controller.limit(drafter.name, sequences, self._num_draft_tokens, rows)
        if longest == 0:
            return [NO_DRAFT] * len(asked)
        start = time.perf_counter()
        drafts = drafter.propose([DraftRequest(r.sequence, min(r.limit, longest)) for r in asked])
        drafted = max(len(draft.tokens) for draft in drafts)
        if drafted:  # else it was catching up
            self._controller.observe_drafting(drafter.name, drafted, time.perf_counter() - start)
        return drafts
