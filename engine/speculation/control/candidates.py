"""What the controller is asked about, and what it answers. Only nouns: nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pilotfish.engine.draft import Draft
from pilotfish.engine.sequence import Sequence


@dataclass(slots=True)
class Candidate:
    """A decoding sequence that may get a draft in this step."""

    sequence: Sequence
    limit: int
    """Most tokens of a draft, at least 1."""
    drafts: list[Draft] = field(default_factory=list)
    """Proposals, none of them empty: those of lookup drafters before `ask`, the others before `choose`."""
    backlog: dict[str, int] = field(default_factory=dict)
    """The model-based drafters that may draft for it, and the rows that each would have to read first."""
    asked: dict[str, int] = field(default_factory=dict)
    """Tokens that `ask` wants of a drafter."""


@dataclass(slots=True)
class UpcomingStep:
    """What is known of a step before drafts are chosen for it."""

    rows: int
    """Without any draft."""
    decoding: int
    """Number of its rows that commit a token each; the others are prompts'."""
    candidates: list[Candidate]
    context: int = 0
    """Tokens in the KV cache of the sequences that decode."""

    @property
    def load(self) -> int:
        """How many sequences decode, to the next power of two: what pays for one may not for sixteen."""
        return self.decoding.bit_length()


class Promise(NamedTuple):
    """What a choice was expected to bring, against plain decoding."""

    gain: float
    """Goodput, as a multiple of plain decoding's."""
    plain_seconds: float
    """Seconds of the step without drafts."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be verified in a step, and what the controller needs to know once the step's tokens are there."""

    drafts: Mapping[Sequence, Draft]
    goodput: float = 0.0
    """Tokens per second that the choice promises, and that plain decoding would; 0 where nothing was predicted."""
    plain_goodput: float = 0.0
    load: int = 0
    promise: Promise | None = None
    """None where nothing was predicted."""
    token_seconds: float = 0.0
    """Seconds that plain decoding would take for a token of the step."""
    candidates: Mapping[Sequence, Candidate] = field(default_factory=dict)
    """The step's candidates, with all that was drafted for them."""
