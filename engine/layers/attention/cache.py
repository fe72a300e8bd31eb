"""A KV cache in flash-attn's layout, which the torch and flash backends share: allocating it and writing to it.

A cache in float8_e4m3fn (OCP 8-bit floating point, arXiv 2209.05433) holds keys and values as they are, scale 1: what
lies beyond its largest number, 448, is cut off there.
"""

from __future__ import annotations

import torch

from pilotfish.engine.kernels import memory
from pilotfish.engine.layers.attention.backend import LayerCache

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


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


def write(cache: LayerCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write each row's key and value, (rows, kv_heads, head_dim), to its slot; slots (rows,) int64."""
    for stored, rows in ((cache.keys, key), (cache.values, value)):
        # fp8 goes as bytes, since torch lacks some of its operators on some devices.
        flat = as_bytes(stored).flatten(0, 1)  # (num_blocks * block_size, kv_heads, head_dim)
        flat.index_put_((slots,), as_bytes(converted(rows, stored.dtype)))


def converted(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to the cache's dtype. Values beyond fp8's range are clamped: a cast makes them NaN on some devices."""
    if rows.dtype == dtype:
        return rows
    return rows.clamp(-_LARGEST, _LARGEST).to(dtype) if dtype == FP8 else rows.to(dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
