"""The reference attention: torch's scaled_dot_product_attention, span by span, on any device and in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import allocate_paged, as_bytes, store_paged, write


class TorchAttention:
    name = "torch"
    block_size = 16
    capturable = False

    allocate = staticmethod(allocate_paged)
    store = staticmethod(store_paged)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        write(cache, key, value, batch.slots)
        rows, heads, head_dim = query.shape
        out = query.new_empty(rows, heads * head_dim)
        start, window = 0, params.window
        for i, (length, context) in enumerate(zip(batch.query_lens, batch.contexts, strict=True)):
            stop = start + length
            first = 0 if window is None else max(0, context - length - window + 1) // batch.block_size
            blocks = batch.block_tables[i, first : -(-context // batch.block_size)].long()
            seen = context - first * batch.block_size
            attended = _attention(
                query[start:stop].transpose(0, 1),  # (heads, length, head_dim)
                _gather(cache.keys, blocks, seen, query.dtype),
                _gather(cache.values, blocks, seen, query.dtype),
                _mask(length, seen, window, query.device),
                params,
            )
            out[start:stop] = attended.transpose(0, 1).reshape(length, -1)
            start = stop
        return out


def _gather(stored: torch.Tensor, blocks: torch.Tensor, seen: int, dtype: torch.dtype) -> torch.Tensor:
    """(kv_heads, seen, head_dim) out of a sequence's blocks."""
    rows = as_bytes(stored)[blocks].view(stored.dtype).flatten(0, 1)[:seen]
    return rows.to(dtype).transpose(0, 1)


def _attention(
    query: torch.Tensor,  # (heads, length, head_dim)
    keys: torch.Tensor,  # (kv_heads, seen, head_dim)
    values: torch.Tensor,
    mask: torch.Tensor | None,
    params: AttentionParams,
) -> torch.Tensor:
    groups, softcap = len(query) // len(keys), params.softcap
    if not softcap and params.sinks is None:
        q, k, v = (part.unsqueeze(0) for part in (query, keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale, enable_gqa=groups > 1)[0]
    keys, values = (part.float().repeat_interleave(groups, dim=0) for part in (keys, values))
    scores = query.float() @ keys.transpose(1, 2) * params.scale  # (heads, length, seen)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    if params.sinks is not None:
        sinks = params.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        return (torch.cat((scores, sinks), 2).softmax(-1)[..., :-1] @ values).to(query.dtype)
    return (scores.softmax(-1) @ values).to(query.dtype)


def _mask(length: int, context: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The attention mask, (length, context), True where a query may look: causal, aligned to the bottom right. None
    where every query may look everywhere."""
    if length == 1 and (window is None or context <= window):
        return None
    last = torch.arange(context - length, context, device=device).unsqueeze(1)  # (length, 1): each query's own position
    position = torch.arange(context, device=device)
    allowed = position <= last
    return allowed if window is None else allowed & (position > last - window)
