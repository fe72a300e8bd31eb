"""What an answer's grammar and the budget of its reasoning allow, as a mask over logits."""

from __future__ import annotations

import math

import numpy as np
import torch

from pilotfish.engine.device import on_device
from pilotfish.engine.sampling.logit_spans import LogitSpan


def restrict(block: torch.Tensor, unbanned: torch.Tensor | None, span: LogitSpan) -> None:
    """Set logits of tokens that the answer's grammar does not allow to -inf: (rows of the span, vocab), in place.

    `unbanned`: the block before other tokens were forbidden, if any were. Where nothing would be left of a row, the
    grammar holds alone.
    """
    grammar = span.sequence.grammar
    assert grammar is not None
    refused = ~unpack(grammar.masks(span.draft, span.rows), block.shape[1], block.device)
    block.masked_fill_(refused, -math.inf)
    if unbanned is not None:
        empty = (block == -math.inf).all(1, keepdim=True)
        block.copy_(torch.where(empty, unbanned.masked_fill_(refused, -math.inf), block))


def unpack(words: np.ndarray, vocab: int, device: torch.device) -> torch.Tensor:
    """Return the bits of `words`, (rows, words) int32: (rows, vocab) bool on `device`."""
    if device.type == "cpu":
        bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, count=vocab, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    packed = on_device(torch.from_numpy(np.ascontiguousarray(words)), device)
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    return (packed.unsqueeze(2) >> shifts & 1).bool().flatten(1)[:, :vocab]
