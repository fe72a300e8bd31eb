"""The Triton attention backend against torch's, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import allocate_paged, write
from pilotfish.engine.layers.attention.choose import AttentionNeeds, why_not
from pilotfish.engine.layers.attention.torch import TorchAttention

triton = pytest.importorskip("pilotfish.engine.layers.attention.triton")

CPU = torch.device("cpu")
SPLIT = 128
Sequences = list[tuple[int, int]]
"""(tokens in the cache, tokens of the span) of each sequence."""
MIXED: Sequences = [(0, 9), (129, 1), (77, 5), (300, 1), (16, 66)]


def filled(
    sequences: Sequences, kv_heads: int, dim: int, size: int, dtype: torch.dtype
) -> tuple[LayerCache, list[Span]]:
    """Return a cache of random keys and values, and spans whose blocks lie in it in random order."""
    generator = torch.Generator().manual_seed(1)
    needed = [-(-(start + length) // size) for start, length in sequences]
    free = (torch.randperm(sum(needed), generator=generator) + 1).tolist()
    cache = allocate_paged(len(free) + 1, size, kv_heads, dim, dtype, CPU)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    spans = [
        Span([0] * length, start, [free.pop() for _ in range(count)])
        for (start, length), count in zip(sequences, needed, strict=True)
    ]
    return cache, spans


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(2)).to(dtype)


def attended(
    backend: AttentionBackend, query: torch.Tensor, cache: LayerCache, batch: AttentionBatch, **params
) -> torch.Tensor:
    """Attend with the keys and values that the cache has already."""
    key, value = (part.flatten(0, 1)[batch.slots] for part in _parts(cache))
    return backend.attend(query, key, value, cache, batch, AttentionParams(query.shape[2] ** -0.5, **params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "dim", "size", "dtype", "params"),
    [
        (MIXED, 4, 2, 64, 64, torch.float32, {}),
        (MIXED, 6, 2, 96, 16, torch.bfloat16, {"window": 24}),
        ([(129, 1), (77, 5)], 4, 1, 128, 64, torch.float16, {"softcap": 5.0}),
        ([(700, 1), (2, 1)], 3, 1, 256, 16, torch.float32, {}),
        ([(40, 2), (300, 1)], 8, 1, 16, 32, torch.bfloat16, {"window": 1}),
        ([(4500, 1)], 1, 1, 16, 64, torch.float32, {}),
        (MIXED, 4, 2, 64, 64, torch.float32, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
        (
            [(129, 1), (77, 5)],
            4,
            1,
            64,
            64,
            torch.bfloat16,
            {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]), "window": 24},
        ),
    ],
)
def test_it_is_attention(sequences: Sequences, heads, kv_heads, dim, size, dtype, params) -> None:
    cache, spans = filled(sequences, kv_heads, dim, size, dtype)
    batch = flatten(spans, size, CPU).attention
    query = queries(len(batch.slots), heads, dim, dtype)
    found = attended(triton.TritonAttention(132), query, cache, batch, **params)
    wanted = attended(
        TorchAttention(), query.float(), LayerCache(*map(torch.Tensor.float, _parts(cache))), batch, **params
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)


def _parts(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.keys, cache.values


def test_keys_and_values_are_written_first() -> None:
    cache, spans = filled([(20, 3)], 2, 16, 16, torch.float32)
    batch = flatten(spans, 16, CPU).attention
    own = LayerCache(cache.keys.clone(), cache.values.clone())
    key, value = queries(3, 2, 16, torch.float32), queries(3, 2, 16, torch.float32) + 1
    query = queries(3, 4, 16, torch.float32)
    found = triton.TritonAttention(1).attend(query, key, value, cache, batch, AttentionParams(0.25))
    write(own, key, value, batch.slots)
    assert torch.equal(cache.keys, own.keys)
    assert torch.equal(cache.values, own.values)
    torch.testing.assert_close(found, attended(TorchAttention(), query, own, batch), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("params", [{}, {"window": 150}, {"sinks": torch.tensor([1.0, -2.0])}])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(processors: int, params: dict[str, Any]) -> None:
    """Whether its context is divided over programs or not: the text must not depend on other requests."""
    cache, spans = filled([(3, 2), (290, 3), (130, 1)], 1, 16, 16, torch.bfloat16)
    batch = flatten(spans, 16, CPU).attention
    query = queries(len(batch.slots), 2, 16, torch.bfloat16)
    together = attended(triton.TritonAttention(processors), query, cache, batch, **params)
    row = 0
    for span in spans:
        for i in range(len(span.token_ids)):
            alone = flatten([Span([0], span.start + i, span.blocks)], 16, CPU).attention
            for other in (1, 132):
                found = attended(triton.TritonAttention(other), query[row : row + 1], cache, alone, **params)
                assert torch.equal(found[0], together[row]), (span.start, i, other)
            row += 1


def test_bounds_in_place_of_lengths_change_no_bit() -> None:
    """As in a captured pass: lengths are read on the device, the lists are bounds, and some spans have no rows."""
    cache, spans = filled([(40, 3), (300, 1), (7, 2)], 1, 16, 16, torch.float32)
    exact = flatten(spans, 16, CPU).attention
    query = queries(len(exact.slots), 2, 16, torch.float32)
    wanted = attended(triton.TritonAttention(132), query, cache, exact)
    empty = 3
    tables = torch.zeros(len(spans) + empty, 64, dtype=torch.int32)
    tables[: len(spans), : exact.block_tables.shape[1]] = exact.block_tables
    last = exact.cu_query_lens[-1:]
    bounded = replace(
        exact,
        cu_query_lens=torch.cat([exact.cu_query_lens, last.expand(empty)]),
        context_lens=torch.cat([exact.context_lens, torch.zeros(empty, dtype=torch.int32)]),
        block_tables=tables,
        query_lens=[5] * len(tables),
        contexts=[1024] * len(tables),
        exact=False,
    )
    assert torch.equal(attended(triton.TritonAttention(132), query, cache, bounded), wanted)


@given(st.integers(1, 1 << 20))
def test_splits_count_up(context: int) -> None:
    """One more key begins at most one more split, and there are few of them."""
    assert 0 <= triton.split_count(context + 1, SPLIT) - triton.split_count(context, SPLIT) <= 1
    assert triton.split_count(context, SPLIT) <= 32 + 16 * max(0, (context // SPLIT).bit_length() - 5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": None}, "NVIDIA GPUs, not on cpu"),
        ({"capability": (7, 5)}, "8.0"),
        ({"head_dim": 512}, "at most 256"),
        ({"cache_dtype": torch.float8_e4m3fn, "capability": (8, 0)}, "8.9"),
    ],
)
def test_what_it_was_not_written_for(changed: dict[str, object], reason: str) -> None:
    needs = AttentionNeeds(CPU, (9, 0), torch.bfloat16, torch.bfloat16, 128, 0)
    assert why_not("triton", needs) is None
    assert reason in (why_not("triton", replace(needs, **changed)) or "")  # type: ignore[arg-type]
