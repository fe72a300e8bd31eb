"""The speculator: asks each sequence's drafter for a draft of a length that makes sense."""

from __future__ import annotations

from collections import defaultdict

from engine.sequence import Sequence
from engine.speculation.drafter import Draft, Drafter, DraftRequest


class Speculator:
    """`num_draft_tokens` for every sequence that has a drafter, less where its answer or context ends sooner."""

    def __init__(self, drafters: list[Drafter], num_draft_tokens: int, max_model_len: int) -> None:
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._num_draft_tokens = num_draft_tokens
        self._max_model_len = max_model_len

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._drafters)

    def draft(self, sequences: list[Sequence]) -> dict[Sequence, Draft]:
        """Drafts for those of `sequences` that have one."""
        requests: dict[str, list[DraftRequest]] = defaultdict(list)
        for sequence in sequences:
            # Verification commits one token more than are drafted.
            left = min(sequence.params.max_tokens - sequence.output_len, self._max_model_len - len(sequence.tokens)) - 1
            limit = min(self._num_draft_tokens, left)
            if sequence.drafter in self._drafters and limit > 0:
                requests[sequence.drafter].append(DraftRequest(sequence, limit))
        drafts: dict[Sequence, Draft] = {}
        for name, asked in requests.items():
            for request, draft in zip(asked, self._drafters[name].propose(asked), strict=True):
                if draft.tokens:
                    drafts[request.sequence] = draft
        return drafts

    def release(self, sequence: Sequence) -> None:
        for drafter in self._drafters.values():
            drafter.release(sequence)
