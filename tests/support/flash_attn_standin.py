"""flash-attn's functions in torch, on the CPU: their documented semantics, and their refusals, word for word in effect.

Whatever the real functions check before they launch a kernel is checked here (only the device is not), so that a call
that passes here is one that they accept. `SIGNATURES` are the real ones', copied from the packages' sources:

- flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py; the checks are csrc/flash_attn/flash_api.cpp's;
- flash-attn-4 4.0.0b36, flash_attn/cute/interface.py; the checks are `_flash_attn_fwd`'s and `_validate_head_dims`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

REQUIRED = "required"

SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "flash_attn.flash_attn_varlen_func": [
        *((name, REQUIRED) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("alibi_slopes", None),
        ("deterministic", False),
        ("return_attn_probs", False),
        ("block_table", None),
    ],
    "flash_attn.flash_attn_with_kvcache": [
        *((name, REQUIRED) for name in ("q", "k_cache", "v_cache")),
        *((name, None) for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")),
        *((name, None) for name in ("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale")),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ],
    "flash_attn.cute.flash_attn_varlen_func": [
        *((name, REQUIRED) for name in ("q", "k", "v")),
        *((name, None) for name in ("qv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
        *((name, None) for name in ("min_seqlen_k", "seqused_q", "seqused_k", "gather_kv_indices", "page_table")),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (None, None)),
        ("learnable_sink", None),
        ("softcap", 0.0),
        ("num_splits", 1),
        ("pack_gqa", None),
        ("deterministic", False),
        *((name, None) for name in ("score_mod", "score_mod_bwd", "mask_mod", "block_sparse_tensors")),
        *((name, None) for name in ("aux_tensors", "aux_scalars")),
        ("return_lse", False),
        ("scheduler_metadata", None),
        ("seqlen_k_per_split", None),
        ("disable_scheduler_metadata", False),
        ("gather_bwd_recompute_p", False),
        ("gather_bwd_token_chunk", None),
    ],
}

HALF = (torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def modules(capability: tuple[int, int], calls: list[str] | None = None) -> dict[str, ModuleType]:
    """The packages as sys.modules would have them on a GPU of that compute capability. `calls` gets what is called."""

    def cute_varlen(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        left, right = (-1 if side is None else side for side in window_size)
        _check_cute(capability, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, num_splits, left >= 0)
        _check((qv, seqused_q, learnable_sink, score_mod, mask_mod) == (None,) * 5, "not in the stand-in")
        whole_pages = k.shape[1] == _key_tile(capability, q.shape[-1], local=left >= 0)
        spans = (cu_seqlens_q, seqused_k, page_table)
        out = _paged(q, k, v, *spans, softmax_scale, causal, left, right, softcap, whole_pages)
        _check(max_seqlen_q is None or max_seqlen_q >= int(cu_seqlens_q.diff().max()), "max_seqlen_q is no bound")
        _check(max_seqlen_k is None or max_seqlen_k >= int(seqused_k.max()), "max_seqlen_k is no bound")
        return out.to(torch.bfloat16 if v.dtype in FP8 else q.dtype), None

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)  # inspect.signature sees through it
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            if calls is not None:
                calls.append(name)
            return function(*arguments, **keywords)

        return wrapper

    flash_attn, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    flash_attn.__path__ = []  # a package
    found = (
        (flash_attn, flash_attn_varlen_func, "flash_attn_varlen_func"),
        (flash_attn, flash_attn_with_kvcache, "flash_attn_with_kvcache"),
        (cute, cute_varlen, "flash_attn_varlen_func"),
    )
    for module, function, name in found:
        setattr(module, name, counted(function, f"{module.__name__}.{name}"))
    return {"flash_attn": flash_attn, "flash_attn.cute": cute}


class Refused(Exception):
    """What the real function would have raised, a RuntimeError or AssertionError."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    _check((dropout_p, alibi_slopes, return_attn_probs) == (0.0, None, False), "not in the stand-in")
    _check_flash2(q, k, v, block_table)
    spans = len(cu_seqlens_q) - 1
    for lengths in (cu_seqlens_q, cu_seqlens_k):
        _check(lengths.dtype == torch.int32, "cu_seqlens must have dtype int32")
        _check(lengths.is_contiguous() and lengths.shape == (spans + 1,), "shapes, strides or bounds are wrong")
    _check(spans > 0, "batch size must be positive")
    _check(block_table.shape[0] == spans, "shapes, strides or bounds are wrong")
    query_lens, key_lens = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    _check(isinstance(max_seqlen_q, int) and max_seqlen_q >= int(query_lens.max()), "max_seqlen_q is no bound")
    _check(isinstance(max_seqlen_k, int) and max_seqlen_k >= int(key_lens.max()), "max_seqlen_k is no bound")
    if max_seqlen_q == 1:
        _check(len(q) == spans, "with a max_seqlen_q of 1, q is reshaped to one row for each span")
    left, right = window_size
    return _paged(q, k, v, cu_seqlens_q, key_lens, block_table, softmax_scale, causal, left, right, softcap).to(q.dtype)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    unused = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes)
    _check(unused == (None,) * len(unused) and not return_softmax_lse, "not in the stand-in")
    _check(q.ndim == 4, "q must be (batch_size, seqlen, nheads, headdim)")
    _check_flash2(q, k_cache, v_cache, block_table)
    spans, length = q.shape[:2]
    _check(spans > 0, "batch size must be positive")
    _check(block_table.shape[0] == spans, "shapes, strides or bounds are wrong")
    _check(cache_seqlens.dtype == torch.int32, "seqlens_k must have dtype int32")
    _check(cache_seqlens.is_contiguous() and cache_seqlens.shape == (spans,), "shapes, strides or bounds are wrong")
    _check(num_splits <= 128, "num_splits > 128 not supported")
    ends = torch.arange(spans + 1, dtype=torch.int32) * length
    left, right = window_size
    out = _paged(
        q.flatten(0, 1), k_cache, v_cache, ends, cache_seqlens, block_table, softmax_scale, causal, left, right, softcap
    )
    return out.view(q.shape).to(q.dtype)


def _check_flash2(q, k, v, block_table) -> None:
    _check(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    _check(k.dtype == q.dtype, "query and key must have the same dtype")
    _check(v.dtype == q.dtype, "query and value must have the same dtype")
    _check(block_table is not None, "only the paged cache is in the stand-in")
    _check(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
    _check(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    for tensor in (q, k, v):
        _check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    _check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    _check(k.shape == v.shape and k.shape[-1] == q.shape[-1], "shapes, strides or bounds are wrong")


def _check_cute(capability, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, num_splits, local) -> None:
    major = capability[0]
    _check(cu_seqlens_q is not None and page_table is not None and seqused_k is not None, "not in the stand-in")
    _check(cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    spans = len(cu_seqlens_q) - 1
    _check(page_table.dtype == torch.int32, "page_table must be int32")
    _check(page_table.stride(-1) == 1, "page_table must be contiguous in the last dimension")
    _check(page_table.shape[0] == spans, "shapes, strides or bounds are wrong")
    head_dim = q.shape[-1]
    _check(k.shape == (*v.shape[:2], v.shape[-2], head_dim), "shapes, strides or bounds are wrong")
    _check(seqused_k.shape == (spans,), "seqused_k must have shape (batch_size,)")
    _check(v.dtype in (*HALF, *FP8), "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2")
    _check(q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype")
    for lengths in (cu_seqlens_q, seqused_k):
        _check(lengths.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be int32")
        _check(lengths.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be contiguous")
    _check(major in (8, 9, 10, 11, 12), "Unsupported compute capability")
    _check(q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv")
    alignment = 16 // v.element_size()
    if major == 9:
        _check(8 <= head_dim <= 256 and head_dim % alignment == 0, "is not supported on SM90")
    elif major in (10, 11):
        _check((8 <= head_dim <= 128 or head_dim == 256) and head_dim % alignment == 0, "not supported on SM100/SM110")
    loaded_whole = k.shape[1] == _key_tile(capability, head_dim, local)
    _check(head_dim % 16 == 0 or loaded_whole, "Paged KV does not support irregular head dim")
    if v.dtype in FP8:
        _check(major == 10, "FP8 is only supported on SM100 (compute capability 10.x) for FA4 CuTe.")
    # The heuristic (num_splits < 1) may come to more than one split, too.
    _check(major != 8, "paged KV not supported on SM 8.0")
    _check(major != 9 or num_splits == 1, "SplitKV not supported on SM 9.0")
    _check(major != 12, "Paged KV not supported on SM 12.0 in this PR")


def _key_tile(capability, head_dim: int, local: bool) -> int:
    """Keys in a tile, causal: a page of as many is loaded whole (`_tile_size_fwd_sm90`, `_get_fwd_config`)."""
    if capability[0] != 9 or head_dim <= 128:
        return 128
    if head_dim <= 192:
        return 96 if local else 128 if head_dim <= 128 else 112
    return 64 if local else 80


def _paged(q, k, v, cu_query_lens, key_lens, table, scale, causal, left, right, softcap, whole_pages=False):
    """softmax(q @ k.T * scale, where it may look) @ v, span by span, in float32: (rows, heads, head_dim).

    `whole_pages`: the rows behind a span's last key, in its last page, are multiplied by 0 and not left out.
    """
    page, groups = k.shape[1], q.shape[-2] // k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends, counts = cu_query_lens.tolist(), key_lens.tolist()
    _check(ends[0] == 0 and ends[-1] == len(q), "shapes, strides or bounds are wrong")
    out = torch.empty(q.shape)
    for i, (start, stop, count) in enumerate(zip(ends, ends[1:], counts, strict=False)):
        used = math.ceil(count / page)
        if start == stop:  # no work, whatever its keys are
            continue
        _check(used <= table.shape[1] and int(table[i, :used].max()) < len(k), "reads beyond the cache")
        pages = table[i, :used].long()
        loaded = used * page if whole_pages else count
        keys, values = (part[pages].flatten(0, 1)[:loaded].float().repeat_interleave(groups, 1) for part in (k, v))
        place = torch.arange(stop - start)[:, None] + count - (stop - start)  # of each query among the keys
        other = torch.arange(loaded)
        allowed = (other < count).expand(stop - start, loaded)
        if causal:
            allowed = allowed & (other <= place)
        if left >= 0:
            allowed = allowed & (other >= place - left)
        if right >= 0:
            allowed = allowed & (other <= place + right)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)  # a row without keys is 0
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values)
    return out
