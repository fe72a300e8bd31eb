"""From the host to the device, without waiting for it: several arrays in one copy.

To wait for a copy is to wait for everything that the device has been given before it, which is the whole forward pass.
Copies out of pinned memory need no waiting; torch's caching allocator for it reuses no buffer before its copy is done.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from engine.device import on_device

_ALIGNMENT = 16
"""Bytes: an array begins at a multiple of it, more than any kernel asks of ids and lengths."""


def packed_to(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays as tensors of their shapes and dtypes on `device`: views of one buffer, filled by a single copy."""
    starts = [0]
    for array in arrays:
        starts.append(-(-(starts[-1] + array.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    host = np.empty(max(starts[-1], _ALIGNMENT), dtype=np.uint8)  # some, so that it can be viewed as other dtypes
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = on_device(torch.from_numpy(host), device)
    return [_view(buffer, array, start) for array, start in zip(arrays, starts, strict=False)]


def _view(buffer: torch.Tensor, array: np.ndarray, start: int) -> torch.Tensor:
    count = prod(array.shape) * array.itemsize
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    return buffer[start : start + count].view(dtype).view(array.shape)
