"""The interface of attention backends, which attend spans of queries to a paged KV cache; one file for each.

The terms are flash-attn's (flash_attn_varlen_func with a block table): causal, aligned to the bottom right, so the last
query of a span sees the whole context and the one before it one key less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The spans of one step, flattened: rows cu_query_lens[i] to cu_query_lens[i + 1] belong to span i.

    All tensors are on the model's device. The lists are the same numbers for backends that loop on the host. In a
    captured pass they are upper bounds instead, the same for every span, and spans may have no rows at all (see
    `engine.execution.graphs`).
    """

    cu_query_lens: torch.Tensor  # (spans + 1,) int32
    context_lens: torch.Tensor  # (spans,) int32: keys that a span's last query sees, the span's own included
    cu_context_lens: torch.Tensor  # (spans + 1,) int32: running sums of context_lens, from 0
    block_tables: torch.Tensor  # (spans, max_blocks) int32; entries past a span's context are never read
    slots: torch.Tensor  # (rows,) int64: block * block_size + offset, where each row's key and value go
    query_lens: list[int]
    contexts: list[int]
    block_size: int
    adapters: tuple[tuple[int, torch.Tensor | None], ...] = ()
    """Low-rank adapters by number, with the rows that have each, int64; None: all rows."""
    exact: bool = True
    """Whether the lists are the batch's own lengths, not bounds."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, block by block: (num_blocks, block_size, kv_heads, head_dim) each, as flash-attn has
    them, unless the backend that allocated them has a layout of its own."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """The constants of a layer's attention: how scores become weights."""

    scale: float  # of the scores, before the softmax
    window: int | None = None  # each query sees this many keys, itself included; None: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), as in Gemma 2; None: as they are
    sinks: torch.Tensor | None = None  # (heads,): a score of each head that takes weight and gives no value (gpt-oss)


class AttentionBackend(Protocol):
    name: str
    block_size: int
    """Default tokens per block: the size that this backend computes best with."""
    capturable: bool
    """Whether its launches can be recorded and replayed: it reads a batch's lengths and tables on the device alone, and
    takes `query_lens` and `contexts` as bounds (see `engine.execution.graphs`)."""

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        """Allocate one layer's cache, filled with zeros. On the CPU the system hands out its memory page by page, on
        first use.

        dtype: the cache's; the model's own, or float8_e4m3fn, bfloat16 or int8 for backends that can keep keys and
        values in it (`choose` has the rules).
        """
        ...

    def attend(
        self,
        query: torch.Tensor,  # (rows, heads, head_dim)
        key: torch.Tensor | None,  # (rows, kv_heads, head_dim)
        value: torch.Tensor | None,  # (rows, kv_heads, head_dim)
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Write the rows' keys and values to their slots, then attend: (rows, heads * head_dim). Without `key` and
        `value` they are there already, for caches of `cache.allocate_paged`.

        It never waits for the device, so that the host can go on to the next layer.
        """
        ...

    def store(
        self,
        key: torch.Tensor,  # (rows, kv_heads, head_dim)
        value: torch.Tensor,  # (rows, kv_heads, head_dim)
        cache: LayerCache,
        batch: AttentionBatch,
    ) -> None:
        """Write the rows' keys and values to their slots."""
        ...
