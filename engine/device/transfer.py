"""From the host to the device, without waiting for it: what belongs together in one copy.

To wait for a copy is to wait for everything that the device has been given before it, which is the whole forward pass.
Copies out of pinned memory need no waiting; torch's caching allocator for it reuses no buffer before its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.device import on_device

ALIGNMENT = 16
"""Bytes: an array begins at a multiple of it, more than any kernel asks of ids and lengths."""

TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
}
"""The dtypes of arrays that go to a device."""


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def to_device(buffer: np.ndarray, device: torch.device) -> torch.Tensor:
    """The buffer, (bytes,) uint8, on `device`; on the CPU it is the same memory."""
    return on_device(torch.from_numpy(buffer), device)


def copy_to(buffer: np.ndarray, out: torch.Tensor) -> None:
    """Copy the buffer, (bytes,) uint8, to `out`, which is as long; the host does not wait for a GPU to have it."""
    source = torch.from_numpy(buffer)
    if out.device.type == "cuda":
        source = source.pin_memory()
    out.copy_(source, non_blocking=True)


def arrays_to_device(arrays: Seq[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the arrays' shapes and dtypes (64 or 32 bits wide) on `device`, by a single copy."""
    starts = [0]
    for array in arrays:
        starts.append(aligned(starts[-1] + array.nbytes))
    buffer = np.zeros(max(starts[-1], ALIGNMENT), dtype=np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = to_device(buffer, device)
    return [
        there[start : start + array.nbytes].view(TORCH_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def ids_to_device(ids: Seq[int], device: torch.device) -> torch.Tensor:
    """(len(ids),) int64."""
    return arrays_to_device([np.array(ids, dtype=np.int64)], device)[0]
