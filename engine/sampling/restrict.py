"""What an answer's grammar and the budget of its reasoning allow, as a mask over logits."""

from __future__ import annotations

import math

import numpy as np
import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.kernels.native import mask_logits
from pilotfish.engine.sampling.logit_spans import LogitSpan


def restrict(block: torch.Tensor, unbanned: torch.Tensor | None, span: LogitSpan) -> None:
    """Set logits of tokens that the answer's grammar does not allow to -inf: (rows of the span, vocab), contiguous, in
    place.

    `unbanned`: the block before other tokens were forbidden, if any were. Where nothing would be left of a row, the
    grammar holds alone.
    """
    grammar = span.sequence.grammar
    assert grammar is not None
    words = torch.from_numpy(np.ascontiguousarray(grammar.masks(span.draft, span.rows)))
    _mask(block, words)
    if unbanned is not None:
        _mask(unbanned, words)
        empty = (block == -math.inf).all(1, keepdim=True)
        block.copy_(torch.where(empty, unbanned, block))


def _mask(logits: torch.Tensor, words: torch.Tensor) -> None:
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and mask_logits(logits, words):
        return
    logits.masked_fill_(~unpack(words, logits.shape[1], logits.device), -math.inf)


def unpack(words: torch.Tensor, vocab: int, device: torch.device) -> torch.Tensor:
    """Return the bits of `words`, (rows, words) int32 on the CPU: (rows, vocab) bool on `device`."""
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    return (on_device(words, device).unsqueeze(2) >> shifts & 1).bool().flatten(1)[:, :vocab]
