"""Copies from the host to the device that do not wait for it; arrays that belong together go in one copy.

Waiting for a copy means waiting for everything queued before it, which is the whole forward pass. Copies from pinned
memory need no waiting; torch's caching allocator for it reuses no buffer before its copy is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from math import prod
from typing import Any

import numpy as np
import torch

from pilotfish.engine.device import on_device

ALIGNMENT = 16
"""Arrays begin at multiples of so many bytes, more than any kernel requires of ids and lengths."""

_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
}


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class PackedLayout:
    """The offsets of arrays of these dtypes (64 or 32 bits wide) and shapes in one buffer of `size` bytes."""

    __slots__ = ("_arrays", "size")

    def __init__(self, arrays: Iterable[tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
        self._arrays: list[tuple[int, int, np.dtype[Any], tuple[int, ...]]] = []
        start = 0
        for dtype, shape in arrays:
            stop = start + prod(shape) * dtype.itemsize
            self._arrays.append((start, stop, dtype, shape))
            start = aligned(stop)
        self.size = max(start, ALIGNMENT)

    def on_host(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Views of a buffer, (at least `size`,) uint8, in host memory."""
        return [np.ndarray(shape, dtype, buffer, start) for start, _, dtype, shape in self._arrays]

    def on_device(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Views of a buffer, (at least `size`,) uint8, on any device."""
        return [buffer[start:stop].view(_TORCH[dtype]).view(shape) for start, stop, dtype, shape in self._arrays]


def to_device(buffer: np.ndarray, device: torch.device) -> torch.Tensor:
    """The buffer, (bytes,) uint8, on `device`; on the CPU it is the same memory."""
    return on_device(torch.from_numpy(buffer), device)


def copy_to(buffer: np.ndarray, out: torch.Tensor) -> None:
    """Copy the buffer, (bytes,) uint8, to `out`, which is as long, without waiting for a GPU."""
    source = torch.from_numpy(buffer)
    if out.device.type == "cuda":
        source = source.pin_memory()
    out.copy_(source, non_blocking=True)


def arrays_to_device(arrays: Seq[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the arrays' shapes and dtypes (64 or 32 bits wide) on `device`, by a single copy."""
    layout = PackedLayout((array.dtype, array.shape) for array in arrays)
    buffer = np.zeros(layout.size, dtype=np.uint8)
    for packed, array in zip(layout.on_host(buffer), arrays, strict=True):
        packed[...] = array
    return layout.on_device(to_device(buffer, device))


def ids_to_device(ids: Seq[int], device: torch.device) -> torch.Tensor:
    """The ids on `device`, (len(ids),) int64."""
    return arrays_to_device([np.array(ids, dtype=np.int64)], device)[0]
