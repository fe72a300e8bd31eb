"""Memory for weights and caches on the CPU, in huge pages where the system provides them.

A step reads every weight once, so with pages of 4 KiB it waits for an address translation every 64 cache lines: on a
virtual machine, where a translation walks two tables, weights arrived half as fast. Linux gives pages of 2 MiB on
request (madvise(2), MADV_HUGEPAGE; Documentation/admin-guide/mm/transhuge.rst), for ranges that hold whole ones.
Weights are often smaller than that, so they lie side by side in large mappings.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

HUGE_PAGE = 2 << 20
CHUNK = 64 << 20
ALIGNMENT = 64
"""A cache line, and the widest vector register."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the CPU. The system hands it out by pages, on first use; torch.zeros would touch it all."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return _mapped(size)[:size].view(dtype).view(shape)


class Arena:
    """Hands out pieces of mappings, one after the other. A mapping is freed with the last of its tensors."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        reserved = -(-size // ALIGNMENT) * ALIGNMENT
        if reserved > len(self._chunk):
            if reserved >= CHUNK:  # what is left of the chunk is for smaller ones
                return zeros(shape, dtype)
            self._chunk = _mapped(CHUNK)
        piece, self._chunk = self._chunk[:size], self._chunk[reserved:]
        return piece.view(dtype).view(shape)


def _mapped(size: int) -> torch.Tensor:
    """Map at least `size` bytes, all 0, that start at a huge page's boundary if one fits."""
    if size < HUGE_PAGE:
        return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), dtype=torch.uint8)
    mapping = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(mapping, dtype=torch.uint8)
    return found[-found.data_ptr() % HUGE_PAGE :]
