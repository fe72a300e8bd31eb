"""Batches of spans. A Span is the positions of one sequence that a step computes; a HostBatch has all spans of a pass
in one buffer on the host; a FlatBatch is the same as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch

from pilotfish.engine.device.transfer import to_device
from pilotfish.engine.execution.batch_layout import BatchArrays, BatchLayout, BatchShape
from pilotfish.engine.layers.attention.backend import AttentionBatch
from pilotfish.engine.sampling.noise import row_keys


class Draw(NamedTuple):
    """How tokens are drawn in the pass itself: by noise and temperature alone."""

    seed: int
    temperature: float
    """0: the likeliest token."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens at positions [start, start + len(token_ids)) of a sequence whose KV lies in `blocks`."""

    token_ids: Seq[int]
    start: int
    blocks: Seq[int]
    logit_rows: int = 0
    """Number of its last rows whose logits are wanted."""
    adapter: int = 0
    """The number of its low-rank adapter; 0: none."""
    draw: Draw | None = None
    """How these rows draw; None: any token will do, or none is wanted of the pass."""
    sees: int = 0
    """Keys that its last row sees, of which others of the pass may write some: rows of a block that see each other, one
    span each. 0: up to its own."""

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


_ANY = Draw(0, 0.0)


@dataclass(frozen=True, slots=True)
class HostBatch:
    """The inputs of a pass in host memory: one buffer, which can be sent as it is, and its arrays by name."""

    layout: BatchLayout
    buffer: np.ndarray  # (layout.size,) uint8
    arrays: BatchArrays[np.ndarray]
    """Views of the buffer."""
    query_lens: list[int]
    contexts: list[int]
    block_size: int

    @staticmethod
    def unpack(shape: BatchShape, buffer: np.ndarray, block_size: int) -> HostBatch:
        """The batch that another process has packed, as views of its buffer."""
        layout = BatchLayout(shape)
        arrays = layout.on_host(buffer)
        query_lens = np.diff(arrays.cu_query_lens).tolist()
        return HostBatch(layout, buffer, arrays, query_lens, arrays.context_lens.tolist(), block_size)

    @property
    def shape(self) -> BatchShape:
        return self.layout.shape

    def to(self, device: torch.device) -> FlatBatch:
        """The same on `device`, by a single copy; on the CPU it is the same memory."""
        if device.type == "cpu":
            arrays = self.arrays.as_tensors()
        else:
            arrays = self.layout.on_device(to_device(self.buffer, device))
        batch = FlatBatch.of(arrays, self.query_lens, self.contexts, self.block_size)
        if not self.adapted:
            return batch
        return FlatBatch(batch.arrays, replace(batch.attention, adapters=self._adapters(device)))

    @property
    def adapted(self) -> bool:
        """Whether any row has an adapter."""
        return bool(self.arrays.adapters.any())

    def _adapters(self, device: torch.device) -> tuple[tuple[int, torch.Tensor | None], ...]:
        numbers = self.arrays.adapters
        found = [int(number) for number in np.unique(numbers) if number]
        if len(found) == 1 and (numbers == found[0]).all():
            return ((found[0], None),)
        return tuple((number, torch.from_numpy(np.flatnonzero(numbers == number)).to(device)) for number in found)


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """A batch's tensors on a device, by name, and those among them that attention reads."""

    arrays: BatchArrays[torch.Tensor]
    attention: AttentionBatch

    @staticmethod
    def of(arrays: BatchArrays[torch.Tensor], query_lens: list[int], contexts: list[int], block_size: int) -> FlatBatch:
        """The batch of these tensors; the lists are the spans' lengths on the host (see AttentionBatch)."""
        attention = AttentionBatch(
            slots=arrays.slots,
            cu_query_lens=arrays.cu_query_lens,
            context_lens=arrays.context_lens,
            cu_context_lens=arrays.cu_context_lens,
            block_tables=arrays.block_tables,
            query_lens=query_lens,
            contexts=contexts,
            block_size=block_size,
        )
        return FlatBatch(arrays, attention)

    @staticmethod
    def bounded(
        arrays: BatchArrays[torch.Tensor], block_tables: torch.Tensor, length: int, longest: int, block_size: int
    ) -> FlatBatch:
        """A batch whose spans have at most `length` rows and `longest` tokens of context, as only the device knows.
        block_tables: (spans, max_blocks) int32, in the place of those of `arrays`."""
        spans = len(block_tables)
        batch = FlatBatch.of(arrays, [length] * spans, [longest] * spans, block_size)
        return FlatBatch(batch.arrays, replace(batch.attention, block_tables=block_tables, exact=False))


FEW_ROWS = 32
"""Rows that are packed one by one."""


def pack(spans: Seq[Span], block_size: int, ahead: int = 0) -> HostBatch:
    """Pack the spans' rows, one after the other. Block tables have the blocks of so many tokens `ahead`, too, as far as
    the spans have them."""
    lengths = [len(span.token_ids) for span in spans]
    contexts = [span.sees or span.start + length for span, length in zip(spans, lengths, strict=True)]
    wanted = [span.logit_rows for span in spans]
    shape = BatchShape(
        spans=len(spans), rows=sum(lengths), wanted=sum(wanted), max_blocks=-(-(max(contexts) + ahead) // block_size)
    )
    layout = BatchLayout(shape)
    buffer = np.zeros(layout.size, dtype=np.uint8)
    arrays = layout.on_host(buffer)
    arrays.token_ids[:] = np.fromiter(chain.from_iterable([span.token_ids for span in spans]), np.int64, shape.rows)
    arrays.context_lens[:] = contexts
    for table, span, context in zip(arrays.block_tables, spans, contexts, strict=True):
        there = span.blocks[: -(-(context + ahead) // block_size)]
        table[: len(there)] = there
    fill = _fill_few if shape.rows <= FEW_ROWS else _fill_many
    fill(arrays, spans, lengths, contexts, wanted, block_size)
    if any(span.adapter for span in spans):
        arrays.adapters[:] = np.repeat([span.adapter for span in spans], lengths)
    if any(span.draw is not None for span in spans):
        draws = [span.draw or _ANY for span in spans for _ in range(span.logit_rows)]
        # A row predicts the position after its own.
        arrays.draw_keys[:] = row_keys([draw.seed for draw in draws], arrays.positions[arrays.logit_rows] + 1)
        arrays.temperatures[:] = [draw.temperature for draw in draws]
    return HostBatch(layout, buffer, arrays, lengths, contexts, block_size)


def _fill_few(
    arrays: BatchArrays[np.ndarray],
    spans: Seq[Span],
    lengths: list[int],
    contexts: list[int],
    wanted: list[int],
    block_size: int,
) -> None:
    """As `_fill_many`, row by row: on the CPU a pass has emptied the caches, so that each of numpy's operations comes
    from memory again, and takes longer than these."""
    ends = list(accumulate(lengths))
    arrays.cu_query_lens[1:] = ends
    arrays.cu_context_lens[1:] = list(accumulate(contexts))
    positions = [range(span.start, span.start + length) for span, length in zip(spans, lengths, strict=True)]
    arrays.positions[:] = list(chain.from_iterable(positions))
    arrays.slots[:] = [
        span.blocks[position // block_size] * block_size + position % block_size
        for span, own in zip(spans, positions, strict=True)
        for position in own
    ]
    arrays.logit_rows[:] = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]


def _fill_many(
    arrays: BatchArrays[np.ndarray],
    spans: Seq[Span],
    lengths: list[int],
    contexts: list[int],
    wanted: list[int],
    block_size: int,
) -> None:
    """Fill the running sums, and what follows for each row from its place in its span."""
    count, ends = sum(lengths), arrays.cu_query_lens[1:]
    np.cumsum(lengths, out=ends)
    np.cumsum(contexts, out=arrays.cu_context_lens[1:])
    # Row r of the batch is position r - end + stop of its sequence.
    rows = np.arange(count)
    arrays.positions[:] = rows + np.repeat(np.array([span.stop for span in spans]) - ends, lengths)
    blocks, offsets = np.divmod(arrays.positions, block_size)
    span_of_row = np.repeat(np.arange(len(spans)), lengths)
    arrays.slots[:] = arrays.block_tables[span_of_row, blocks] * np.int64(block_size) + offsets
    drawing = sum(wanted)
    if drawing == count:
        arrays.logit_rows[:] = rows
    else:
        arrays.logit_rows[:] = np.arange(drawing) + np.repeat(ends - np.cumsum(wanted), wanted)


def flatten(spans: Seq[Span], block_size: int, device: torch.device) -> FlatBatch:
    """The spans' tensors, on `device` by a single copy."""
    return pack(spans, block_size).to(device)
