"""The controller's inputs and outputs, as plain data."""

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
    """Maximum tokens of a draft, at least 1."""
    drafts: list[Draft] = field(default_factory=list)
    """Proposals, none of them empty: those of lookup drafters before `ask`, the others before `choose`."""
    backlog: dict[str, int] = field(default_factory=dict)
    """By model-based drafter that may draft for it, the rows that the drafter would have to read first."""
    asked: dict[str, int] = field(default_factory=dict)
    """Tokens that `ask` requests, by drafter."""
    left: int = 0
    """Tokens that the answer may still have behind the next one, which bound a `LongDrafter`."""


@dataclass(slots=True)
class UpcomingStep:
    """A step before drafts are chosen for it."""

    rows: int
    """Number of rows without any draft."""
    decoding: int
    """Number of its rows that commit a token each; the others are prompts'."""
    candidates: list[Candidate]
    context: int = 0
    """Tokens in the KV cache of the sequences that decode."""

    @property
    def load(self) -> int:
        """Class of the number of decoding sequences, by powers of two: what pays for one may not for sixteen."""
        return self.decoding.bit_length()


class Promise(NamedTuple):
    """The expected outcome of a choice, against plain decoding."""

    gain: float
    """Goodput as a multiple of plain decoding's."""
    plain_seconds: float
    """Seconds of the step without drafts."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The drafts to verify in a step, and what the controller needs when the step's tokens are known."""

    drafts: Mapping[Sequence, Draft]
    goodput: float = 0.0
    """Predicted tokens per second with the choice, and of plain decoding; 0 where nothing was predicted."""
    plain_goodput: float = 0.0
    load: int = 0
    promise: Promise | None = None
    """None where nothing was predicted."""
    token_seconds: float = 0.0
    """Predicted seconds of a token in plain decoding."""
    candidates: Mapping[Sequence, Candidate] = field(default_factory=dict)
    """The step's candidates, with all drafts proposed for them."""
