"""A KV cache in flash-attn's layout, which all backends but the native one share: allocating it and writing to it."""

from __future__ import annotations

import torch

from pilotfish.engine.kernels import memory, paged
from pilotfish.engine.kernels.paged import FP8, as_bytes, converted
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache

__all__ = ["FP8", "allocate_paged", "as_bytes", "converted", "head_bytes", "store_paged", "write", "zeros"]

SCALE_BYTES = 4
"""Of the float32 scale that each token's key or value of a head has in int8."""


def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a token's key, or value, of one head."""
    return head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)


def allocate_paged(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """Keys and values, (num_blocks, block_size, kv_heads, head_dim) each, zeros."""
    shape = (num_blocks, block_size, kv_heads, head_dim)
    return LayerCache(*(zeros(shape, dtype, device) for _ in range(2)))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros for a cache; on the CPU the system hands the memory out on first use.

    Kernels also load rows that nobody has written: flash-attn 4 whole blocks (by TMA), the native ones up to the
    longest context. Such rows weigh 0, but 0 times NaN would still be NaN.
    """
    if device.type == "cpu":
        return memory.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def write(cache: LayerCache, key: torch.Tensor | None, value: torch.Tensor | None, slots: torch.Tensor) -> None:
    """Write each row's key and value, (rows, kv_heads, head_dim), to its slot; slots (rows,) int64. None: they are
    there already."""
    if key is not None and value is not None:
        paged.write(cache.keys, cache.values, key, value, slots)


def store_paged(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
    """See `AttentionBackend.store`."""
    write(cache, key, value, batch.slots)
