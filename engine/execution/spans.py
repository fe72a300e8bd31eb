"""Span: the positions of one sequence that a step computes; and the flat tensors that a step's spans make."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.execution.transfer import packed_to
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
    """The spans' tensors, on `device` by a single copy."""
    lengths = [len(span.token_ids) for span in spans]
    contexts = [span.stop for span in spans]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
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
    logit_rows = np.concatenate(wanted, dtype=np.int64) if wanted else np.empty(0, dtype=np.int64)
    context_lens = np.asarray(contexts, dtype=np.int32)
    cu_context_lens = np.cumsum([0, *contexts], dtype=np.int32)
    on_device = packed_to(device, token_ids, positions, logit_rows, slots, ends, context_lens, cu_context_lens, tables)
    return FlatBatch(
        token_ids=on_device[0],
        positions=on_device[1],
        logit_rows=on_device[2],
        attention=AttentionBatch(
            slots=on_device[3],
            cu_query_lens=on_device[4],
            context_lens=on_device[5],
            cu_context_lens=on_device[6],
            block_tables=on_device[7],
            query_lens=lengths,
            contexts=contexts,
            block_size=block_size,
        ),
    )
