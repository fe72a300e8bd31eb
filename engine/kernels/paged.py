"""Writing keys and values to a paged cache in flash-attn's layout, (num_blocks, block_size, kv_heads, head_dim) each.

A cache in float8_e4m3fn (OCP 8-bit floating point, arXiv 2209.05433) holds keys and values as they are, scale 1: what
lies beyond its largest number, 448, is cut off there.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def write(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write each row's key and value, (rows, kv_heads, head_dim), to its slot; slots (rows,) int64.

    Values are made finite: kernels that load whole blocks multiply what a block's last owner has left there by 0, which
    must not become NaN. (What they compute of keys they replace.) The sequence that such values belong to is lost
    either way.
    """
    for stored, rows in ((keys, key), (values, value.nan_to_num())):
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
