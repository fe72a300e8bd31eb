"""A drafter of one file: what CONTRIBUTING says that a new one takes."""

from __future__ import annotations

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest


class ToyDrafter:
    """Drafts the last token again: rarely right, and never wrong about the text."""

    name = "toy"

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        return [Draft((each.sequence.tokens[-1],) * each.limit, drafter=self.name) for each in requests]

    def release(self, sequence: Sequence) -> None:
        pass


def make(config: EngineConfig) -> ToyDrafter:
    return ToyDrafter()
