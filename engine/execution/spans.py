"""Span: the positions of one sequence that a step computes; and the flat tensors that a step's spans make."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.layers.attention.interface import AttentionBatch


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens at positions [start, start + len(token_ids)) of a sequence whose KV lies in `blocks`."""

    token_ids: Seq[int]
    start: int
    blocks: Seq[int]
    logit_rows: int = 0
    """Logits are wanted of this many of its last rows."""

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The rows of all spans, one after the other."""

    token_ids: torch.Tensor  # (rows,) int64
    positions: torch.Tensor  # (rows,) int64
    logit_rows: torch.Tensor  # (wanted,) int64: which rows' logits are wanted
    attention: AttentionBatch


def flatten(spans: Seq[Span], block_size: int, device: torch.device) -> FlatBatch:
    lengths = [len(span.token_ids) for span in spans]
    contexts = [span.stop for span in spans]
    ends = np.cumsum([0, *lengths])
    rows = int(ends[-1])
    token_ids, positions, slots = (np.empty(rows, dtype=np.int64) for _ in range(3))
    tables = np.zeros((len(spans), max(-(-context // block_size) for context in contexts)), dtype=np.int32)
    wanted = []
    for i, span in enumerate(spans):
        first, last = ends[i], ends[i + 1]
        token_ids[first:last] = span.token_ids
        place = np.arange(span.start, span.stop)
        positions[first:last] = place
        used = -(-span.stop // block_size)
        table = tables[i]
        table[:used] = span.blocks[:used]
        slots[first:last] = table[place // block_size].astype(np.int64) * block_size + place % block_size
        if span.logit_rows:
            wanted.append(np.arange(last - span.logit_rows, last))
    logit_rows = np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return FlatBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        logit_rows=tensor(logit_rows),
        attention=AttentionBatch(
            cu_query_lens=tensor(ends.astype(np.int32)),
            context_lens=tensor(np.asarray(contexts, dtype=np.int32)),
            block_tables=tensor(tables),
            slots=tensor(slots),
            query_lens=lengths,
            contexts=contexts,
            block_size=block_size,
        ),
    )
