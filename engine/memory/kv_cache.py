"""The KV cache's tensors, and how many blocks of them fit. `block_pool` hands the blocks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.layers.attention.backend import AttentionBackend, LayerCache
from pilotfish.engine.layers.attention.cache import head_bytes
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import num_kv_heads
from pilotfish.errors import ConfigError


class CacheRoom(NamedTuple):
    """The memory that a rank has for its KV caches, and what a block of them takes."""

    free: int
    """Bytes that could be allocated now."""
    block_bytes: int
    """Bytes of one block of all the rank's caches."""


def count_blocks(config: EngineConfig, rooms: Sequence[CacheRoom], sharing: int, on_gpu: bool) -> int:
    """The number of blocks that fit on every rank. `rooms` are the ranks', in order; every `sharing` consecutive ranks
    share one memory."""
    if config.kv_cache_memory:
        return min(config.kv_cache_memory // room.block_bytes for room in rooms)
    share = cache_share(config.kv_cache_share, on_gpu)
    groups = [rooms[first : first + sharing] for first in range(0, len(rooms), sharing)]
    return min(
        int(share * min(room.free for room in group)) // sum(room.block_bytes for room in group) for group in groups
    )


def check_room(config: EngineConfig, rooms: Sequence[CacheRoom], sharing: int) -> None:
    """Raise ConfigError for a `kv_cache_memory` that there is not: the system would end a process as it fills."""
    for first in range(0, len(rooms), sharing):
        group = rooms[first : first + sharing]
        free = min(room.free for room in group)
        if config.kv_cache_memory * len(group) > free:
            several = f" on each of {len(group)} ranks of this machine" if len(group) > 1 else ""
            raise ConfigError(
                f"kv_cache_memory is {config.kv_cache_memory} bytes{several}, but {free} are free: lower it, or leave "
                "it out"
            )


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of one block over all layers, keys and values, on each of `ranks` tensor-parallel ranks."""
    token = num_kv_heads(config, ranks) * head_bytes(config.head_dim, dtype)
    return 2 * config.num_layers * block_size * token


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
