"""Draft: tokens that are proposed to follow a sequence, to be verified by the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens, and what their drafter knows about them."""

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    """The distribution that each token was drawn from, (len(tokens), vocab) float32; None if the drafter puts
    probability 1 on its token, as prompt lookup does."""
    drafter: str = ""
    """The drafter's name; "" for no draft."""
    evidence: int = 0
    """Class of the drafter's evidence, below 1000, such as the length of an n-gram match."""
    classes: tuple[int, ...] = ()
    """The class of evidence of each token, where they differ; empty if all have `evidence`."""
    confidences: tuple[float, ...] = ()
    """The drafter's own probability of each token; empty if it has none. The controller learns what they are worth."""


NO_DRAFT = Draft()


def shortened(draft: Draft, length: int) -> Draft:
    """Return the first `length` tokens of a draft."""
    if len(draft.tokens) <= length:
        return draft
    if length <= 0:
        return NO_DRAFT
    probs = None if draft.probs is None else draft.probs[:length]
    classes, confidences = draft.classes[:length], draft.confidences[:length]
    return Draft(draft.tokens[:length], probs, draft.drafter, draft.evidence, classes, confidences)
