"""The reference attention: torch's scaled_dot_product_attention, span by span, on any device and in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.layers.attention.interface import AttentionBatch, LayerCache


class TorchAttention:
    name = "torch"

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        shape = (num_blocks, block_size, kv_heads, head_dim)
        return LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)  # (slots, kv_heads, head_dim)
        keys[batch.slots], values[batch.slots] = key, value
        rows, heads, head_dim = query.shape
        out = query.new_empty(rows, heads * head_dim)
        start = 0
        for i, (length, context) in enumerate(zip(batch.query_lens, batch.contexts, strict=True)):
            stop = start + length
            first = 0 if window is None else max(0, context - length - window + 1) // batch.block_size
            blocks = batch.block_tables[i, first : -(-context // batch.block_size)].long()
            seen = context - first * batch.block_size
            attended = F.scaled_dot_product_attention(
                query[start:stop].transpose(0, 1).unsqueeze(0),  # (1, heads, length, head_dim)
                cache.keys[blocks].flatten(0, 1)[:seen].transpose(0, 1).unsqueeze(0),
                cache.values[blocks].flatten(0, 1)[:seen].transpose(0, 1).unsqueeze(0),
                attn_mask=_mask(length, seen, window, query.device),
                scale=scale,
                enable_gqa=heads != key.shape[1],
            )
            out[start:stop] = attended[0].transpose(0, 1).reshape(length, -1)
            start = stop
        return out


def _mask(length: int, context: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a query may look: causal, aligned to the bottom right; None where it may look everywhere."""
    if length == 1 and (window is None or context <= window):
        return None
    last = torch.arange(context - length, context, device=device).unsqueeze(1)  # (length, 1): each query's own place
    place = torch.arange(context, device=device)
    allowed = place <= last
    return allowed if window is None else allowed & (place > last - window)
