"""Attention by this package's own CPU kernels, batch-invariant: the same bits for every batch, span and chunk."""

from __future__ import annotations

import torch

from pilotfish.engine.kernels.native import CACHE_FORMS, AttentionArguments, NativeKernels
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import head_bytes, zeros


class NativeAttention:
    name = "native"
    block_size = 16
    capturable = True

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        """dtype: float32, bfloat16 or int8, whatever the model's own is. Keys lie dimension by dimension:

        - float32 and bfloat16: keys (num_blocks, kv_heads, head_dim, block_size), values (num_blocks, block_size,
          kv_heads, head_dim);
        - int8: both (num_blocks, kv_heads, block_size * (head_dim + 4)): a block's numbers, keys as (head_dim,
          block_size) and values as (block_size, head_dim), and then, in float32, the scale of each of its tokens.
        """
        if dtype == torch.int8:
            shape = (num_blocks, kv_heads, block_size * head_bytes(head_dim, dtype))
            return LayerCache(zeros(shape, dtype, device), zeros(shape, dtype, device))
        keys = zeros((num_blocks, kv_heads, head_dim, block_size), dtype, device)
        values = zeros((num_blocks, block_size, kv_heads, head_dim), dtype, device)
        return LayerCache(keys, values)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        assert key is not None, "its cache has a layout of its own, which it alone writes"
        assert value is not None
        if params.softcap:
            raise ValueError(
                f"softcap is {params.softcap}, but the native kernels know no soft-capping: choose 'torch'"
            )
        if params.sinks is not None:
            raise ValueError("there are sinks, but the native kernels know none: choose 'torch'")
        self.store(key, value, cache, batch)
        rows, heads, head_dim = query.shape
        out = torch.empty(rows, heads * head_dim)
        dtype = cache.keys.dtype
        scratch = self._kernels.attention_scratch(rows, max(batch.contexts), heads, head_dim, dtype)
        self._kernels.attend(
            AttentionArguments(
                query=query.data_ptr(),
                keys=cache.keys.data_ptr(),
                values=cache.values.data_ptr(),
                cu_query_lens=batch.cu_query_lens.data_ptr(),
                context_lens=batch.context_lens.data_ptr(),
                block_tables=batch.block_tables.data_ptr(),
                out=out.data_ptr(),
                scratch=scratch.data_ptr(),
                query_stride=query.stride(0),
                spans=len(batch.query_lens),
                max_blocks=batch.block_tables.shape[1],
                heads=heads,
                kv_heads=cache.keys.shape[1],
                dim=head_dim,
                block_size=batch.block_size,
                window=params.window or 0,
                form=CACHE_FORMS[dtype],
                scale=params.scale,
            )
        )
        return out

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
        """See `AttentionBackend.store`."""
        self._kernels.write_cache(key, value, cache.keys, cache.values, batch.slots, batch.block_size)
