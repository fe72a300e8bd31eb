"""The draft's vocabulary: the tokens that the target writes most often. With a large vocabulary and a small draft, a
head over all tokens would take most of the time (EAGLE-3, and FR-Spec, arXiv 2502.14856)."""

from __future__ import annotations

import torch

from pilotfish.tools.training.text import TextStore


def frequent_tokens(
    text: TextStore, vocab_size: int, count: int, always: tuple[int, ...]
) -> tuple[torch.Tensor, float]:
    """Return the `count` most frequent tokens of answers, including `always`, as ascending ids, (count,) int64; and
    their share of the answers' tokens."""
    counts = _counts(text, vocab_size)
    ranked = counts.clone()
    ranked[list(always)] = torch.iinfo(torch.int64).max
    # Ties go to the lower ids, because tokenizers number their most frequent merges first.
    order = torch.argsort(ranked, descending=True, stable=True)[: min(count, vocab_size)]
    return order.sort().values, float(counts[order].sum() / max(1, int(counts.sum())))


def rarest_token(text: TextStore, vocab_size: int) -> int:
    """Return the token that answers have least often, the last of equals: what stands for a masked one."""
    counts = _counts(text, vocab_size)
    return int((counts == counts.min()).nonzero().max())


def _counts(text: TextStore, vocab_size: int) -> torch.Tensor:
    """Return how often each token occurs in answers, (vocab_size,) int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for conversation in text:
        answer = torch.tensor(conversation.tokens[conversation.prompt_len :], dtype=torch.int64)
        counts += torch.bincount(answer, minlength=vocab_size)
    return counts
