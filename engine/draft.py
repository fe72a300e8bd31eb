"""Draft: tokens that are proposed to follow a sequence, to be verified by the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens, and what their drafter knows of them."""

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    """The distribution that each token was drawn from, (len(tokens), vocab) float32; None where the drafter is certain:
    probability 1 on its token, as in prompt lookup."""
    drafter: str = ""
    """The drafter's name; "" for no draft."""
    evidence: int = 0
    """How strong the drafter's reason is, in its own classes below 1000, such as the length of an n-gram's match."""
    confidences: tuple[float, ...] = ()
    """The drafter's own probability of each of its tokens; empty where it has none. What they are worth is learned."""


NO_DRAFT = Draft()


def shortened(draft: Draft, length: int) -> Draft:
    """The first `length` tokens of a draft."""
    if len(draft.tokens) <= length:
        return draft
    if length <= 0:
        return NO_DRAFT
    probs = None if draft.probs is None else draft.probs[:length]
    return Draft(draft.tokens[:length], probs, draft.drafter, draft.evidence, draft.confidences[:length])
