"""The KV cache's tensors, and how many blocks of them fit. Which block belongs to whom is `block_pool`'s."""

from __future__ import annotations

import torch

from pilotfish.engine.layers.attention.backend import AttentionBackend, LayerCache
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import num_kv_heads


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of one block over all layers, keys and values, on each of `ranks` tensor-parallel ranks."""
    return 2 * config.num_layers * block_size * num_kv_heads(config, ranks) * config.head_dim * dtype.itemsize


def allocate(
    config: ModelConfig,
    attention: AttentionBackend,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int = 1,
) -> list[LayerCache]:
    """Empty caches, one for each layer, on one of `ranks` tensor-parallel ranks."""
    return [
        attention.allocate(num_blocks, block_size, num_kv_heads(config, ranks), config.head_dim, dtype, device)
        for _ in range(config.num_layers)
    ]
