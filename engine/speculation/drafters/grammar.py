"""GrammarDrafter: drafts what the answer's grammar forces, such as keys, quotes, braces and closing tags."""

from __future__ import annotations

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest


class GrammarDrafter:
    """Proposes the tokens that must come next. The target may still spell the same text in other tokens."""

    name = "grammar"

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty without a grammar, or while it leaves a choice."""
        return [self._draft(request.sequence, request.limit) for request in requests]

    def release(self, sequence: Sequence) -> None:
        """Nothing is kept here: the grammar is the sequence's own."""

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        forced = () if sequence.grammar is None else sequence.grammar.forced(limit)
        return Draft(tuple(forced), None, self.name) if forced else NO_DRAFT


def make(config: EngineConfig) -> GrammarDrafter:
    return GrammarDrafter()
