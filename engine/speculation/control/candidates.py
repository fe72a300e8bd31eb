"""What the controller is asked about, and what it answers. Nouns alone: nothing is decided here."""

from __future__ import annotations

from dataclasses import dataclass, field

from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import Draft


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
