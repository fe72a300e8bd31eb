"""The native kernels against torch's operators, and the promise they exist for: they are batch-invariant."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.weights import int8
from pilotfish.tools.selftest.reference import ReferenceAttention, ReferenceKernels

CPU = torch.device("cpu")
EXACT = ReferenceKernels()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 13, 33, 97, 200])
@pytest.mark.parametrize(("columns", "size"), [(16, 16), (40, 64), (577, 96), (48, 1536)])
def test_linear(kernels, rows, columns, size):
    x, weight, bias, residual = (
        random(rows, size),
        random(columns, size, seed=1),
        random(columns, seed=2),
        random(rows, columns),
    )
    prepared = kernels.prepare_linear(weight, bias)
    wanted = EXACT.linear(x, EXACT.prepare_linear(weight, bias), residual).float()
    got = kernels.linear(x, prepared, residual)
    # Rounding of a sum of `size` products, each about 1.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * size)
    for row in range(rows):
        alone = kernels.linear(x[row : row + 1], prepared, residual[row : row + 1])
        assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize(("columns", "size"), [(16, 16), (40, 64), (577, 96), (112, 1536)])
def test_int8_linear(kernels, rows, columns, size):
    x, bias, residual = random(rows, size), random(columns, seed=2), random(rows, columns)
    values, scale = int8.quantize(random(columns, size, seed=1))
    prepared = kernels.prepare_linear(values, bias, scale)
    wanted = EXACT.linear(x, EXACT.prepare_linear(values, bias, scale), residual).float()
    got = kernels.linear(x, prepared, residual)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(
        TorchKernels().linear(x, TorchKernels().prepare_linear(values, bias, scale), residual.clone()),
        wanted,
        rtol=1e-5,
        atol=1e-6 * size,
    )
    for row in range(rows):
        alone = kernels.linear(x[row : row + 1], prepared, residual[row : row + 1])
        assert torch.equal(alone[0], got[row])
    with pytest.raises(ValueError, match="int8"):
        kernels.embed(torch.tensor([0]), prepared)


def test_embedding_is_the_weight(kernels):
    weight = random(100, 48)
    ids = torch.tensor([0, 99, 17, 17, 16, 15])
    assert torch.equal(kernels.embed(ids, kernels.prepare_linear(weight)), weight[ids])


def test_small_operators(kernels):
    x, weight = random(9, 64) * 3, random(64, seed=1)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), EXACT.rms_norm(x, weight, 1e-5).float())
    torch.testing.assert_close(kernels.silu_mul(x * 10), EXACT.silu_mul(x * 10).float())
    qkv = random(9, 5, 32)
    heads = qkv[:, 1:4]  # a view with a stride, as query and key are
    wanted = EXACT.rms_norm(heads, weight[:32], 1e-5).float()
    torch.testing.assert_close(kernels.rms_norm(heads, weight[:32], 1e-5), wanted)
    cos_sin = random(50, 32, seed=3)
    positions = torch.tensor([0, 3, 49, 7, 7, 8, 9, 1, 2])
    wanted = qkv.double()
    EXACT.rotate_(wanted[:, 1:4], positions, cos_sin)
    kernels.rotate_(heads, positions, cos_sin)
    torch.testing.assert_close(qkv, wanted.float())


def test_exponential_over_its_range(kernels):
    """silu(x) * 1 is x / (1 + exp(-x)): right where exp overflows or vanishes, too."""
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-30])])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    gate_up = torch.cat([x, torch.ones_like(x)])[None]
    torch.testing.assert_close(kernels.silu_mul(gate_up)[0], EXACT.silu_mul(gate_up)[0].float(), rtol=3e-6, atol=1e-36)


HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 32, 16


def attend(backend, cache, spans, window=None, seed=0):
    """Attention whose queries, keys and values are functions of (sequence's first block, position) alone."""
    batch = flatten(spans, BLOCK, CPU)
    rows = [(span.blocks[0], position) for span in spans for position in range(span.start, span.stop)]
    qkv = torch.stack([random(HEADS + 2 * KV_HEADS, DIM, seed=seed + 1000 * b + p) for b, p in rows])
    query, key, value = qkv.to(cache.values.dtype).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return backend.attend(query, key, value, cache, batch.attention, AttentionParams(DIM**-0.5, window))


def empty_cache(backend, dtype=torch.float32):
    """A cache full of NaN, which would show wherever it was read."""
    cache = backend.allocate(12, BLOCK, KV_HEADS, DIM, dtype, CPU)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


A, B = [3, 7, 1, 10, 11, 8], [6, 2, 9, 0]


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
def test_attention_equals_its_definition(kernels, window):
    native, reference = NativeAttention(kernels), ReferenceAttention()
    caches = empty_cache(native), empty_cache(reference, torch.float64)
    for spans in (
        [Span([0] * 40, 0, A), Span([0] * 1, 0, B)],
        [Span([0] * 3, 40, A), Span([0] * 1, 1, B)],
        [Span([0] * 1, 43, A), Span([0] * 50, 2, B)],
        [Span([0] * 48, 44, A), Span([0] * 5, 52, B)],
    ):
        got = attend(native, caches[0], spans, window)
        wanted = attend(reference, caches[1], spans, window)
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_attention_is_batch_invariant(kernels, window):
    """The same bits whole, in chunks, row by row and beside others."""
    backend = NativeAttention(kernels)
    whole = attend(backend, empty_cache(backend), [Span([0] * 70, 0, A)], window)
    cache, rows = empty_cache(backend), []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 37), (37, 40), (40, 69), (69, 70)):
        beside = Span([0] * (start % 3 + 1), 0, B)
        got = attend(backend, cache, [beside, Span([0] * (stop - start), start, A)], window)
        rows.append(got[start % 3 + 1 :])
    assert torch.equal(torch.cat(rows), whole)


def test_threads(kernels):
    """Many loops one after the other, from several callers at once, with ever other numbers of threads."""
    x, prepared = random(8, 256), kernels.prepare_linear(random(512, 256, seed=1))
    wanted = kernels.linear(x, prepared)

    def caller(first: int) -> bool:
        same = True
        for i in range(300):
            if i % 50 == 0:
                kernels.set_threads((first + i // 50) % 4 + 1)
            same &= torch.equal(kernels.linear(x, prepared), wanted)
        return same

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(caller, range(3)))


def test_a_loop_does_not_wait_for_threads_that_do_not_run(kernels):
    """64 threads on a machine of few cores: most of them never get there in time, and need not."""
    x, prepared = random(8, 576), kernels.prepare_linear(random(1536, 576, seed=1))
    wanted = kernels.linear(x, prepared)
    kernels.set_threads(64)
    for _ in range(200):
        assert torch.equal(kernels.linear(x, prepared), wanted)
