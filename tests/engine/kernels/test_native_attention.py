"""The native attention over contexts of several splits, in every form of the cache: right, and batch-invariant."""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.attention.backend import AttentionParams, LayerCache
from pilotfish.engine.layers.attention.native import NativeAttention

CPU = torch.device("cpu")
FORMS = [torch.float32, torch.bfloat16, torch.int8]
LENGTH = 700  # two splits and a part of one

Shape = tuple[int, int, int, int, int | None]
"""Heads, KV heads, head_dim, block size, window."""

SHAPES: list[Shape] = [
    (6, 2, 32, 16, None),
    (3, 1, 80, 48, 300),
    (4, 4, 16, 32, 20),
    (8, 1, 64, 16, 256),
]


@pytest.fixture(params=FORMS, ids=["float32", "bfloat16", "int8"])
def form(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@functools.cache
def sequence(seed: int, heads: int, kv_heads: int, dim: int) -> torch.Tensor:
    """Queries, keys and values of a sequence, (LENGTH, heads + 2 * kv_heads, dim). Some keys stand out, so that the
    maximum changes from split to split; some values are zero."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(LENGTH, heads + 2 * kv_heads, dim, generator=generator)
    qkv[::97] *= 3
    qkv[5, heads + kv_heads :] = 0
    return qkv


def tables(blocks: int) -> list[list[int]]:
    """Blocks of two sequences, in no order."""
    order = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(3)).tolist()
    return [order[:blocks], order[blocks:]]


def unwritten(backend: NativeAttention, shape: Shape, form: torch.dtype) -> LayerCache:
    """A cache whose numbers or scales are NaN, which would show wherever they were read."""
    _, kv_heads, dim, size, _ = shape
    cache = backend.allocate(2 * -(-LENGTH // size), size, kv_heads, dim, form, CPU)
    for part in (cache.keys, cache.values):
        part.fill_(-1 if form == torch.int8 else torch.nan)  # four bytes of -1 are a NaN, too
    return cache


def step(
    backend: NativeAttention, cache: LayerCache, shape: Shape, rows: Sequence[tuple[int, int, int]]
) -> list[torch.Tensor]:
    """Attend spans, (sequence, start, stop) each, in one call; returns the results of each."""
    heads, kv_heads, dim, size, window = shape
    blocks = tables(-(-LENGTH // size))
    qkv = torch.cat([sequence(i, heads, kv_heads, dim)[start:stop] for i, start, stop in rows])
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    batch = flatten([Span([0] * (stop - start), start, blocks[i]) for i, start, stop in rows], size, CPU).attention
    out = backend.attend(query, key, value, cache, batch, AttentionParams(dim**-0.5, window))
    return list(out.split([stop - start for _, start, stop in rows]))


def stored(part: torch.Tensor, form: torch.dtype) -> torch.Tensor:
    """What the cache keeps of keys or values, in float64."""
    if form != torch.int8:
        return part.to(form).double()
    scale = part.abs().amax(-1, keepdim=True) / 127
    return (torch.round(part / scale.clamp(min=1e-30)) * scale).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_long_contexts_equal_the_definition(kernels: NativeKernels, form: torch.dtype, shape: Shape) -> None:
    heads, kv_heads, dim, _, window = shape
    backend = NativeAttention(kernels)
    (got,) = step(backend, unwritten(backend, shape, form), shape, [(0, 0, LENGTH)])
    query, key, value = sequence(0, heads, kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
    key, value = (stored(part, form).repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * dim**-0.5
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    scores[:, (distance < 0) | (distance >= (window or LENGTH))] = -math.inf
    wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
    # int8: numbers that lie between two whole ones, to the last bit, may be rounded to either.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=2e-3 if form == torch.int8 else 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_long_contexts_are_batch_invariant(kernels: NativeKernels, form: torch.dtype, shape: Shape) -> None:
    """The same bits whole, in chunks, row by row and beside others, by one thread or by several that share a row."""
    backend = NativeAttention(kernels)
    (whole,) = step(backend, unwritten(backend, shape, form), shape, [(0, 0, LENGTH)])
    for threads in (1, 3, 8):
        kernels.set_threads(threads)
        cache, pieces = unwritten(backend, shape, form), []
        for i, (start, stop) in enumerate(pairwise((0, 130, 255, 256, 257, 300, 512, 515, 600, 601, 605, 689, LENGTH))):
            beside = [(1, 3 * i, 3 * i + 3)] if i % 2 else []
            pieces.append(step(backend, cache, shape, [*beside, (0, start, stop)])[-1])
        assert torch.equal(torch.cat(pieces), whole)


def test_int8_is_the_nearest_number_of_the_scale(kernels: NativeKernels) -> None:
    """Zeros, and the largest of a token and head, are kept as they are."""
    shape: Shape = (2, 2, 16, 16, None)
    backend = NativeAttention(kernels)
    cache = unwritten(backend, shape, torch.int8)
    step(backend, cache, shape, [(0, 0, 16)])
    block = tables(-(-LENGTH // 16))[0][0]
    key, value = sequence(0, 2, 2, 16)[:16].split((2, 2, 2), dim=1)[1:]
    for part, cached, by_dimension in ((key, cache.keys, True), (value, cache.values, False)):
        for head in range(2):
            raw = cached[block, head]
            numbers = raw[: 16 * 16].view(16, 16).T if by_dimension else raw[: 16 * 16].view(16, 16)
            scale = raw[16 * 16 :].view(torch.float32)
            wanted = part[:, head]
            torch.testing.assert_close(scale, wanted.abs().amax(-1) / 127)
            error = (numbers.float() * scale[:, None] - wanted).abs()
            assert (error <= 0.5001 * scale[:, None]).all()
            assert (numbers.abs().amax(-1) == (127 * (scale > 0))).all()
