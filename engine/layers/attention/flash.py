"""Attention by flash-attn's kernels on the paged cache. A step's prefill chunks, decode rows and verify spans go in one
call, causal and aligned to the bottom right. `choose` decides when which package is used.

The calls below and the rules in `why_not_flash2` and `why_not_flash4` are those of the packages' own sources:

- flash-attn 2.8.3.post2 (arXiv 2307.08691): flash_attn/flash_attn_interface.py (`flash_attn_varlen_func`,
  `flash_attn_with_kvcache`) and csrc/flash_attn/flash_api.cpp (`mha_varlen_fwd`, `mha_fwd_kvcache`);
- flash-attn-4 4.0.0b36: flash_attn/cute/interface.py (`flash_attn_varlen_func`, `_flash_attn_fwd`).

Neither package promises batch invariance. In a captured pass `max_seqlen_q`,
`max_seqlen_k` and what the packages derive from them or from the table's width on the host (splits, tiles) are those of
the longest context; the lengths themselves they read on the GPU.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pilotfish.checkpoints.catalog import cache_folder
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import allocate_paged, converted, store_paged, write

Function = Callable[..., Any]

MOST_SPLIT_ROWS = 64
"""Longest span, in rows, for flash-attn 2's split-KV kernels: one tile of queries (flash_api.cpp, set_params_splitkv).
Longer ones keep the GPU busy without being split."""

FLASH2_NEEDS = {
    "flash_attn_varlen_func": ("block_table", "window_size", "softcap", "causal", "softmax_scale"),
    "flash_attn_with_kvcache": ("cache_seqlens", "block_table", "window_size", "softcap", "causal", "num_splits"),
}
FLASH4_NEEDS = {
    "flash_attn_varlen_func": (
        *("cu_seqlens_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table"),
        *("softmax_scale", "causal", "window_size", "softcap", "num_splits"),
    )
}


class Flash2Attention:
    """FlashAttention-2. Spans of equal length, as in plain decoding, go to the kernel that splits a long context over
    the GPU (`flash_attn_with_kvcache`), mixed ones to `flash_attn_varlen_func`."""

    name = "flash2"
    block_size = 256
    capturable = True

    def __init__(self, varlen: Function, with_kvcache: Function) -> None:
        self._varlen, self._with_kvcache = varlen, with_kvcache

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
        common: dict[str, Any] = {
            "softmax_scale": params.scale,
            "causal": True,
            # Keys before and after a query's own position.
            "window_size": (-1, -1) if params.window is None else (params.window - 1, 0),
            "softcap": params.softcap or 0.0,
            "block_table": batch.block_tables,
        }
        spans, longest = len(batch.query_lens), max(batch.query_lens)
        attended: torch.Tensor
        # Of a captured pass only one row a span is known to be equal.
        equal = rows == spans * longest and (batch.exact or longest == 1)
        if longest <= MOST_SPLIT_ROWS and equal:
            attended = self._with_kvcache(
                query.view(spans, longest, heads, head_dim),
                cache.keys,
                cache.values,
                cache_seqlens=batch.context_lens,
                num_splits=0,  # as many as its heuristic finds best
                **common,
            )
        else:
            attended = self._varlen(
                query,
                cache.keys,
                cache.values,
                cu_seqlens_q=batch.cu_query_lens,
                cu_seqlens_k=batch.cu_context_lens,
                max_seqlen_q=longest,
                max_seqlen_k=max(batch.contexts),
                **common,
            )
        return attended.reshape(rows, heads * head_dim)


class Flash4Attention:
    """FlashAttention-4. `split` lets it split long contexts over the GPU, which it cannot do on Hopper.

    With a cache in fp8 the query is rounded to fp8 as well, since the kernel wants query, keys and values of one dtype;
    it returns bfloat16 then.
    """

    name = "flash4"
    # The key tile of Blackwell's kernels and of Hopper's up to head_dim 128: whole blocks are loaded by TMA then.
    block_size = 128
    capturable = True

    def __init__(self, varlen: Function, split: bool) -> None:
        self._varlen = varlen
        self.splits = split
        self._num_splits = 0 if split else 1  # 0: as many as its heuristic finds best

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
        attended: torch.Tensor
        attended, _ = self._varlen(  # the log-sum-exp of each row comes with it, or None
            converted(query, cache.keys.dtype),
            cache.keys,
            cache.values,
            cu_seqlens_q=batch.cu_query_lens,
            seqused_k=batch.context_lens,
            max_seqlen_q=max(batch.query_lens),
            max_seqlen_k=max(batch.contexts),
            page_table=batch.block_tables,
            softmax_scale=params.scale,
            causal=True,
            window_size=(None, None) if params.window is None else (params.window - 1, 0),
            softcap=params.softcap or 0.0,
            num_splits=self._num_splits,
        )
        return attended.reshape(len(query), -1).to(query.dtype)


def load_flash2() -> Flash2Attention:
    """Import FlashAttention-2. Raises ImportError with what is missing."""
    varlen, with_kvcache = _load("flash_attn", "flash-attn", FLASH2_NEEDS)
    return Flash2Attention(varlen, with_kvcache)


def load_flash4(capability: tuple[int, int]) -> Flash4Attention:
    """Import FlashAttention-4. Raises ImportError with what is missing.

    flash-attn 2's wheel has an older `flash_attn.cute`, which is told apart by its parameters. A kernel takes some 10 s
    to compile, and by default the package forgets it at the end of the process.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_folder() / "flash-attn-4"))
    (varlen,) = _load("flash_attn.cute", "flash-attn-4", FLASH4_NEEDS)
    return Flash4Attention(varlen, split=capability[0] in (10, 11))


def _load(module: str, package: str, needs: Mapping[str, tuple[str, ...]]) -> list[Function]:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # also what a CUDA library of another version raises: OSError, AttributeError, ...
        raise ImportError(f"{package} cannot be imported ({type(error).__name__}: {error})") from error
    functions = []
    for name, parameters in needs.items():
        function = getattr(found, name, None)
        if function is None:
            raise ImportError(f"{package} is not what is installed as {module}: it has no {name}")
        there = inspect.signature(function).parameters
        if missing := [parameter for parameter in parameters if parameter not in there]:
            raise ImportError(f"{module}.{name} has no parameter {missing[0]!r}: install a newer {package}")
        functions.append(function)
    return functions
