"""Coupled verification: the target draws its own tokens, and a draft is accepted as far as it agrees with them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.sampling.logit_spans import LogitSpan, rows_of
from pilotfish.engine.sampling.sampler import argmax, choose
from pilotfish.engine.verification.verifier import DraftedRow, Verdict, agreed, lazily, verdicts

AT_ONCE = 16
"""Rows of greedy answers whose likeliest tokens are found in one call on the CPU, though some may not be needed:
looking through a row takes less time than another call."""


class CoupledVerifier:
    """A drafted token is accepted while it is the very token that the target draws at its position.

    What the target draws there depends on its distribution and on noise keyed by seed and position, so the text is the
    same with any draft (drafter-invariant speculative decoding, arXiv 2408.07978).

    sync_free: draw all rows at once, without the host reading tokens in between.
    """

    keyed = True

    def __init__(self, eos_token_ids: Seq[int], sync_free: bool = False) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._sync_free = sync_free

    @torch.inference_mode()
    def verify(self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft]) -> list[Verdict]:
        return verdicts(logits, spans, drafts, self._eos_token_ids, self._draw)

    def _draw(
        self, logits: torch.Tensor, spans: list[LogitSpan], drafts: list[Draft], starts: list[int]
    ) -> list[list[int]]:
        greedy = all(span.sequence.params.greedy for span in spans)
        if not self._sync_free and not (greedy and len(logits) <= AT_ONCE):
            return lazily(logits, spans, drafts, starts, _choose)
        return agreed(argmax(logits) if greedy else choose(logits, rows_of(spans)), drafts, starts)


def _choose(logits: torch.Tensor, rows: list[DraftedRow]) -> list[int]:
    return choose(logits, [row.logits for row in rows])
