"""Coupled verification: the target draws its own tokens, and a draft is accepted as far as it agrees with them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.sampler import argmax, choose
from pilotfish.engine.verification.verifier import Verdict, verdicts


class CoupledVerifier:
    """A drafted token is accepted while it is the very token that the target draws at its position.

    What the target draws there depends on its distribution and on noise keyed by seed and position, so the text is the
    same with any draft (drafter-invariant speculative decoding, arXiv 2408.07978).

    lazy: look at the rows behind a drafted token only once it is accepted, which saves work on the CPU; otherwise all
    rows are drawn at once, which saves synchronization with a GPU.
    """

    def __init__(self, eos_token_ids: Seq[int], lazy: bool = True) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._draw = _drawn_lazily if lazy else _drawn

    @torch.inference_mode()
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        return verdicts(logits, spans, drafts, self._eos_token_ids, self._draw)


def _drawn(logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int]) -> list[list[int]]:
    """Each span's tokens up to the first that was not drafted, all rows drawn at once."""
    greedy = all(span.sequence.params.greedy for span in spans)
    drawn = argmax(logits) if greedy else choose(logits, rows_of(spans))
    tokens = []
    for start, draft in zip(starts, drafts, strict=False):
        end = start + len(draft.tokens)
        for at, drafted in enumerate(draft.tokens, start):
            if drawn[at] != drafted:
                end = at
                break
        tokens.append(drawn[start : end + 1])
    return tokens


def _drawn_lazily(
    logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int]
) -> list[list[int]]:
    """The same, row by row; sampled rows in rounds, since their noise is made for several at once."""
    tokens: list[list[int]] = [[] for _ in spans]
    open_spans = []
    for i, (span, draft) in enumerate(zip(spans, drafts, strict=True)):
        if not span.sequence.params.greedy:
            open_spans.append(i)
            continue
        for at, drafted in enumerate((*draft.tokens, None), starts[i]):
            (token,) = argmax(logits[at : at + 1])
            tokens[i].append(token)
            if token != drafted:
                break
    while open_spans:
        rows = [
            LogitRow(starts[i] + len(tokens[i]), spans[i].sequence, spans[i].first_position + len(tokens[i]))
            for i in open_spans
        ]
        for i, token in zip(open_spans, choose(logits, rows), strict=True):
            tokens[i].append(token)
        open_spans = [i for i in open_spans if tuple(tokens[i]) == drafts[i].tokens[: len(tokens[i])]]
    return tokens
