"""What a drafter is: something that proposes the next tokens of some sequences. One file for each beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Ask for at most `limit` (>= 1) tokens to follow `sequence.tokens`."""

    sequence: Sequence
    limit: int


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens; `probs` is the distribution each was drawn from, (len(tokens), vocab) float32, or None where the
    drafter is certain (probability 1 on its token, as prompt lookup is)."""

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    drafter: str = ""
    evidence: int = 0
    """How strong the drafter's reason is, in its own classes (the n-gram drafter's: the length of its match)."""


NO_DRAFT = Draft()


def shortened(draft: Draft, length: int) -> Draft:
    """The first `length` tokens of a draft."""
    if len(draft.tokens) <= length:
        return draft
    if length <= 0:
        return NO_DRAFT
    probs = None if draft.probs is None else draft.probs[:length]
    return Draft(draft.tokens[:length], probs, draft.drafter, draft.evidence)


class Drafter(Protocol):
    """Proposals never change the text, only its speed: a drafter may be wrong, and may propose fewer tokens or none.

    A drafter reads `sequence.tokens` when asked and catches up with what was added since it last saw the sequence; it
    is not told of acceptance. Tokens that it saw never change (a sequence only grows).
    """

    name: str
    free: bool
    """Its proposals take no time worth counting, so it is asked at every step."""

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """One Draft for each of `requests`, in their order."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended (or was never seen): its memory is free afterwards."""
        ...
