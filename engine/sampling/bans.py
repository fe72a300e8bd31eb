"""Tokens that may not be drawn: all but `allowed_token_ids`, ends of `bad_words`, stops before `min_tokens`."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.sampling.logit_spans import LogitSpan


def forbid(block: torch.Tensor, span: LogitSpan, early: int, stops: Seq[int]) -> None:
    """Set logits of tokens that may not be drawn to -inf: (rows of the span, vocab), contiguous, in place.

    The first `early` rows may not draw `stops`. Where nothing would be left of allowed_token_ids, these hold alone.
    """
    allowed = span.sequence.params.allowed_token_ids
    if allowed is not None:
        ids = on_device(list(allowed), block.device)
        kept = block.index_select(1, ids)
        block.fill_(-math.inf).index_copy_(1, ids, kept)
    banned = _ends_of_words(span)
    for row in banned[:early]:
        row.update(stops)
    if allowed is not None:
        banned = [set() if row.issuperset(allowed) else row for row in banned]
    places = [row * block.shape[1] + token for row, tokens in enumerate(banned) for token in tokens]
    if places:
        block.view(-1).index_fill_(0, on_device(places, block.device, torch.int64), -math.inf)


def _ends_of_words(span: LogitSpan) -> list[set[int]]:
    """Return for each row of a span the tokens that would complete one of its bad words in the answer."""
    words, prompt_len = span.sequence.params.bad_words, span.sequence.prompt_len
    single = {word[0] for word in words if len(word) == 1}
    banned = [set(single) for _ in range(span.rows)]
    longer = [word for word in words if len(word) > 1]
    if not longer:
        return banned
    longest = max(map(len, longer))
    start = max(prompt_len, span.first_position - longest + 1)
    drafted_from = max(0, start - len(span.sequence.tokens))
    text = (*span.sequence.tokens[start:], *span.draft[drafted_from:])
    for row, ends in enumerate(banned):
        known = span.first_position + row - start
        for *head, end in longer:
            if known >= len(head) and text[known - len(head) : known] == tuple(head):
                ends.add(end)
    return banned
