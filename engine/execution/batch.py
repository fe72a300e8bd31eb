"""Span: the positions of one sequence that a step computes; HostBatch: all spans of a pass in one packed buffer, made
on the host once; FlatBatch: the same as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np
import torch

from pilotfish.engine.device.transfer import ALIGNMENT, to_device
from pilotfish.engine.layers.attention.backend import AttentionBatch


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
class BatchShape:
    """Sizes from which the layout of a packed batch follows."""

    spans: int
    rows: int
    wanted: int
    """Rows whose logits are wanted."""
    max_blocks: int
    """Width of the block tables."""

    def fields(self) -> tuple[tuple[type[np.generic], tuple[int, ...]], ...]:
        """dtype and shape of each array, in the order of `HostBatch.arrays`."""
        spans, rows = self.spans, self.rows
        wide, narrow = np.int64, np.int32
        return (
            (wide, (rows,)),  # token_ids
            (wide, (rows,)),  # positions
            (wide, (self.wanted,)),  # logit_rows
            (wide, (rows,)),  # slots
            (narrow, (spans + 1,)),  # cu_query_lens
            (narrow, (spans,)),  # context_lens
            (narrow, (spans + 1,)),  # cu_context_lens
            (narrow, (spans, self.max_blocks)),  # block_tables
        )

    def offsets(self) -> tuple[int, ...]:
        """Where each array begins in the buffer, in bytes; and its whole size."""
        starts = [0]
        for dtype, shape in self.fields():
            size = prod(shape) * np.dtype(dtype).itemsize
            starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
        return tuple(starts)


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What a pass over some spans needs, in host memory: one buffer, which can go to a device or to another process as
    it is."""

    shape: BatchShape
    buffer: np.ndarray  # (bytes,) uint8
    query_lens: list[int]
    contexts: list[int]
    block_size: int

    @staticmethod
    def unpack(shape: BatchShape, buffer: np.ndarray, block_size: int) -> HostBatch:
        """The batch that another process has packed, on its buffer, which is not copied."""
        starts = shape.offsets()
        ends = _array(buffer, starts[4], np.int32, (shape.spans + 1,))
        contexts = _array(buffer, starts[5], np.int32, (shape.spans,))
        return HostBatch(shape, buffer, np.diff(ends).tolist(), contexts.tolist(), block_size)

    def arrays(self) -> list[np.ndarray]:
        """Views of the buffer, as `BatchShape.fields` lists them."""
        return _views(self.shape, self.buffer)

    def to(self, device: torch.device) -> FlatBatch:
        """The same on `device`, by a single copy."""
        return flat_batch(self, to_device(self.buffer, device))


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The rows of all spans, one after the other."""

    token_ids: torch.Tensor  # (rows,) int64
    positions: torch.Tensor  # (rows,) int64
    logit_rows: torch.Tensor  # (wanted,) int64: which rows' logits are wanted
    attention: AttentionBatch


def pack(spans: Seq[Span], block_size: int) -> HostBatch:
    """The spans' rows, one after the other."""
    lengths = [len(span.token_ids) for span in spans]
    contexts = [span.start + length for span, length in zip(spans, lengths, strict=True)]
    wanted = [span.logit_rows for span in spans]
    shape = BatchShape(
        spans=len(spans), rows=sum(lengths), wanted=sum(wanted), max_blocks=-(-max(contexts) // block_size)
    )
    buffer = np.zeros(max(shape.offsets()[-1], ALIGNMENT), dtype=np.uint8)
    token_ids, positions, logit_rows, slots, ends, context_lens, cu_context_lens, tables = _views(shape, buffer)
    token_ids[:] = np.fromiter(chain.from_iterable([span.token_ids for span in spans]), np.int64, shape.rows)
    np.cumsum(lengths, out=ends[1:])
    context_lens[:] = contexts
    np.cumsum(context_lens, out=cu_context_lens[1:])
    for table, span, context in zip(tables, spans, contexts, strict=True):
        used = -(-context // block_size)
        table[:used] = span.blocks[:used]
    # Row r of all is position r - end + context of its span.
    rows = np.arange(shape.rows)
    positions[:] = rows + np.repeat(context_lens - ends[1:], lengths)
    blocks, places = np.divmod(positions, block_size)
    slots[:] = tables[np.repeat(np.arange(shape.spans), lengths), blocks] * np.int64(block_size) + places
    if shape.wanted == shape.rows:
        logit_rows[:] = rows
    else:
        logit_rows[:] = np.arange(shape.wanted) + np.repeat(ends[1:] - np.cumsum(wanted), wanted)
    return HostBatch(shape, buffer, lengths, contexts, block_size)


def flat_batch(batch: HostBatch, buffer: torch.Tensor) -> FlatBatch:
    """The tensors of `batch` on `buffer`, (bytes,) uint8: its own buffer on some device."""
    starts = batch.shape.offsets()
    token_ids, positions, logit_rows, slots, ends, context_lens, cu_context_lens, tables = (
        _tensor(buffer, start, dtype, shape)
        for start, (dtype, shape) in zip(starts, batch.shape.fields(), strict=False)
    )
    return FlatBatch(
        token_ids=token_ids,
        positions=positions,
        logit_rows=logit_rows,
        attention=AttentionBatch(
            slots=slots,
            cu_query_lens=ends,
            context_lens=context_lens,
            cu_context_lens=cu_context_lens,
            block_tables=tables,
            query_lens=batch.query_lens,
            contexts=batch.contexts,
            block_size=batch.block_size,
        ),
    )


def flatten(spans: Seq[Span], block_size: int, device: torch.device) -> FlatBatch:
    """The spans' tensors, on `device` by a single copy."""
    return pack(spans, block_size).to(device)


_TORCH = {np.int64: torch.int64, np.int32: torch.int32}


def _views(shape: BatchShape, buffer: np.ndarray) -> list[np.ndarray]:
    return [
        _array(buffer, start, dtype, size)
        for start, (dtype, size) in zip(shape.offsets(), shape.fields(), strict=False)
    ]


def _array(buffer: np.ndarray, start: int, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    return buffer[start : start + size].view(dtype).reshape(shape)


def _tensor(buffer: torch.Tensor, start: int, dtype: type[np.generic], shape: tuple[int, ...]) -> torch.Tensor:
    size = prod(shape) * np.dtype(dtype).itemsize
    return buffer[start : start + size].view(_TORCH[dtype]).view(shape)
