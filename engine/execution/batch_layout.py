"""The layout of a pass's batch: its arrays by name, with dtype and shape, and where each of them lies in one buffer.

A new array, such as the adapter of each row, is a line in `BatchArrays` and is filled in `batch.pack`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Generic, NamedTuple, TypeVar, get_type_hints

import numpy as np
import torch

from pilotfish.engine.device.transfer import PackedLayout

A = TypeVar("A", np.ndarray, torch.Tensor)


class BatchShape(NamedTuple):
    """The sizes from which the layout of a batch follows."""

    spans: int
    rows: int
    """Tokens of all spans."""
    wanted: int
    """Rows whose logits are wanted."""
    max_blocks: int
    """Width of the block tables."""

    @property
    def bounds(self) -> int:
        """Entries of an array of running sums over the spans, which begins with 0."""
        return self.spans + 1


@dataclass(frozen=True, slots=True)
class BatchArrays(Generic[A]):
    """The arrays of a batch, in the order of its buffer. The spans' rows follow one another.

    An annotation holds an array's dtype and its shape, as names of sizes in BatchShape.
    """

    token_ids: Annotated[A, np.int64, "rows"]
    positions: Annotated[A, np.int64, "rows"]
    logit_rows: Annotated[A, np.int64, "wanted"]
    """The rows whose logits are wanted."""
    draw_keys: Annotated[A, np.int64, "wanted"]
    """The key of each of these rows' noise (`sampling.noise`), where a token is drawn in the pass."""
    slots: Annotated[A, np.int64, "rows"]
    """Where each row's key and value are written: block * block_size + offset."""
    adapters: Annotated[A, np.int32, "rows"]
    """The number of each row's low-rank adapter; 0: none."""
    temperatures: Annotated[A, np.float32, "wanted"]
    """What each of these rows' logits are divided by; 0: the likeliest token is drawn."""
    cu_query_lens: Annotated[A, np.int32, "bounds"]
    """Rows cu_query_lens[i] to cu_query_lens[i + 1] are those of span i."""
    context_lens: Annotated[A, np.int32, "spans"]
    """Number of keys that a span's last row sees, the span's own included."""
    cu_context_lens: Annotated[A, np.int32, "bounds"]
    block_tables: Annotated[A, np.int32, "spans", "max_blocks"]
    """Entries past a span's context are blocks of anybody's, and never read."""

    def as_tensors(self: BatchArrays[np.ndarray]) -> BatchArrays[torch.Tensor]:
        """The same memory as tensors on the CPU."""
        return BatchArrays(*[torch.from_numpy(getattr(self, name)) for name in _FIELDS])


_FIELDS = {
    name: (np.dtype(dtype), sizes)
    for name, hint in get_type_hints(BatchArrays, include_extras=True).items()
    for dtype, *sizes in (hint.__metadata__,)
}
PER_ROW = tuple(name for name, (_, sizes) in _FIELDS.items() if sizes[-1] == "rows")
"""The arrays that have an entry for each row, in their last dimension."""
PER_WANTED = tuple(name for name, (_, sizes) in _FIELDS.items() if sizes[-1] == "wanted")
"""Those that have one for each row whose logits are wanted."""


class BatchLayout:
    """The offsets of the arrays of a batch of this shape in one buffer of `size` bytes."""

    __slots__ = ("_packed", "shape", "size")

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self._packed = PackedLayout(
            [(dtype, tuple([getattr(shape, name) for name in sizes])) for dtype, sizes in _FIELDS.values()]
        )
        self.size = self._packed.size

    def on_host(self, buffer: np.ndarray) -> BatchArrays[np.ndarray]:
        """Views of a buffer, (at least `size`,) uint8, in host memory."""
        return BatchArrays(*self._packed.on_host(buffer))

    def on_device(self, buffer: torch.Tensor) -> BatchArrays[torch.Tensor]:
        """Views of a buffer, (at least `size`,) uint8, on any device."""
        return BatchArrays(*self._packed.on_device(buffer))
