"""The Triton kernels against torch's operators, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.sampling import noise
from pilotfish.engine.sampling.device_sampler import draw_keyed
from pilotfish.engine.sampling.processors import scale_rows
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.tools.selftest.precision import units

triton = pytest.importorskip("pilotfish.engine.kernels.triton")

TORCH = TorchKernels()
FUSED = triton.TritonKernels()
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
few = settings(max_examples=10, deadline=None)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To one unit in the last place of 16 bits, a few of float32: the order of a sum."""
    assert found.dtype == wanted.dtype
    bound = 8.0 if found.dtype == torch.float32 else 1.0
    assert units(found, wanted.double(), found.dtype) <= bound


def alone(operator, *rows: torch.Tensor) -> torch.Tensor:
    """The operator's result row by row."""
    return torch.cat([operator(*(each[i : i + 1].clone() for each in rows)) for i in range(len(rows[0]))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 48, 257])
@pytest.mark.parametrize("weights", ["change", "post", "post, float32", "no change", "no norm"])
def test_add_norm(dtype: torch.dtype, size: int, weights: str) -> None:
    hidden, change = random(3, size, dtype=dtype, scale=3), random(3, size, dtype=dtype, seed=1)
    kind = torch.float32 if "float32" in weights else dtype
    post = 1 + random(size, dtype=kind, seed=2) if "post" in weights else None
    weight = None if weights == "no norm" else 1 + random(size, dtype=kind, seed=3)
    given_change = None if weights == "no change" else change
    before = hidden.clone()
    total, normed = FUSED.add_norm(hidden, given_change, post, weight, EPS)
    wanted_total, wanted = TORCH.add_norm(hidden, given_change, post, weight, EPS)
    assert torch.equal(hidden, before)
    if post is None:
        assert torch.equal(total, wanted_total)
    else:
        close(total, wanted_total)
    close(normed, wanted)

    def one(hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return torch.cat(FUSED.add_norm(hidden, None if given_change is None else change, post, weight, EPS), dim=1)

    assert torch.equal(alone(one, hidden, change), torch.cat([total, normed], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    qkv = random(4, 5, 96, dtype=dtype, scale=30)
    for x, weight in ((qkv[:, 1:4], random(96, dtype=dtype, seed=1)), (qkv.flatten(1)[:, :200], random(200, seed=2))):
        close(FUSED.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS))
        assert torch.equal(
            alone(lambda row, weight=weight: FUSED.rms_norm(row, weight, EPS), x), FUSED.rms_norm(x, weight, EPS)
        )
    assert FUSED.rms_norm(qkv[:0, 1:4], random(96), EPS).shape == (0, 3, 96)


CACHES = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float8_e4m3fn)]


@pytest.mark.parametrize(("dtype", "stored"), CACHES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 96), (1, 1, 256)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_write(dtype, stored, heads, kv_heads, dim, normed) -> None:
    rows, size = 5, 4
    qkv = random(rows, heads + 2 * kv_heads, dim, dtype=dtype, scale=200 if stored.itemsize == 1 else 1)
    norms = (1 + random(dim, dtype=dtype, seed=1), 1 + random(dim, seed=2)) if normed else None
    positions, cos_sin = torch.tensor([0, 49, 3, 3, 7]), random(50, dim, seed=3)
    slots = torch.tensor([9, 1, 0, 11, 6])
    caches = [
        (torch.zeros(3, size, kv_heads, dim).to(stored), torch.zeros(3, size, kv_heads, dim).to(stored))
        for _ in range(2)
    ]
    wanted = TORCH.rotate_and_write(qkv.clone(), kv_heads, norms, positions, cos_sin, EPS, caches[0], slots)
    found = FUSED.rotate_and_write(qkv.clone(), kv_heads, norms, positions, cos_sin, EPS, caches[1], slots)
    assert found.shape == (rows, heads, dim)
    if not normed:
        assert torch.equal(found, wanted)
    close(found, wanted)
    for mine, its in zip(caches[1], caches[0], strict=True):
        if normed and mine is caches[1][0]:
            close(mine.float().to(dtype), its.float().to(dtype)) if stored.itemsize > 1 else None
        else:
            assert torch.equal(mine.float(), its.float())
    if not normed:
        x, its = qkv.clone()[:, 1:], qkv.clone()[:, 1:]
        FUSED.rotate_(x, positions, cos_sin)
        TORCH.rotate_(its, positions, cos_sin)
        assert torch.equal(x, its)
    again = caches[1][0].clone(), caches[1][1].clone()

    def one(qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return FUSED.rotate_and_write(qkv, kv_heads, norms, positions, cos_sin, EPS, again, slots)

    assert torch.equal(alone(one, qkv, positions, slots), found)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, caches[1], strict=True))


@pytest.mark.parametrize(("dtype", "stored"), CACHES, ids=str)
def test_values_are_finite_in_the_cache(dtype: torch.dtype, stored: torch.dtype) -> None:
    qkv = random(3, 3, 16, dtype=dtype)
    qkv[:, 2, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    written = []
    for kernels in (TORCH, FUSED):
        cache = (torch.zeros(1, 4, 1, 16).to(stored), torch.zeros(1, 4, 1, 16).to(stored))
        kernels.rotate_and_write(
            qkv.clone(), 1, None, torch.arange(3), random(50, 16, seed=3), EPS, cache, torch.arange(3)
        )
        written.append(cache[1].float())
    most = torch.finfo(stored).max
    assert written[0][0, 0, 0, :3].tolist() == [0.0, most, -most]
    assert torch.equal(*written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 40, 1500])
def test_gates(dtype: torch.dtype, size: int) -> None:
    gate_up = random(3, 2 * size, dtype=dtype, scale=8)
    gate_up[0, 0] = -80.0
    for name in ("silu_mul", "gelu_mul"):
        found, wanted = getattr(FUSED, name)(gate_up), getattr(TORCH, name)(gate_up)
        close(found, wanted)
        assert torch.equal(alone(getattr(FUSED, name), gate_up), found)


@few
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(DTYPES), st.sampled_from([1e-4, 1.0, 8e3]))
def test_quantizing(rows: int, size: int, dtype: torch.dtype, scale: float) -> None:
    x = random(rows, size, dtype=dtype, seed=size, scale=scale)
    x[0] = 0
    (found, scales), (wanted, wanted_scales) = triton.quantized(x), quantize(x)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_long_rows_are_quantized_by_windows() -> None:
    x = random(2, 20000, dtype=torch.bfloat16)
    (found, scales), (wanted, wanted_scales) = triton.quantized(x), quantize(x)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_fp8_linear_is_the_same() -> None:
    weight, scale = quantize(random(32, 48))
    prepared = TORCH.prepare_linear(weight, random(32, seed=1), scale)
    x, residual = random(3, 48, seed=2), random(3, 32, seed=3)
    assert torch.equal(FUSED.linear(x, prepared, residual.clone()), TORCH.linear(x, prepared, residual.clone()))


@pytest.mark.parametrize("vocab", [5, 1024, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_race(vocab: int, dtype: torch.dtype) -> None:
    """The tokens of `noise.gumbel_race`, whose noise is the same up to rounding."""
    logits = random(6, vocab, dtype=dtype, seed=vocab, scale=2)
    logits[:, ::3] = -torch.inf
    temperatures = torch.tensor([1.0, 0.7, 0.0, 2.0, 0.0, 1e-3])
    row_keys = [noise.row_key(7, i) for i in range(6)]
    halves, keys = torch.from_numpy(noise.key_halves(row_keys)), torch.from_numpy(noise.as_int64(row_keys))
    scaled = scale_rows(logits, temperatures.clamp(min=1e-37).unsqueeze(1))
    assert torch.equal(triton.race(scaled, keys), noise.gumbel_race(scaled, halves))
    found = triton.race(logits, keys, temperatures)
    wanted = noise.gumbel_race(scaled, halves)
    assert torch.equal(draw_keyed(logits, keys, temperatures), found)
    wanted[[2, 4]] = logits[[2, 4]].float().argmax(1)
    assert torch.equal(found, wanted)
    for i in range(6):
        part = slice(i, i + 1)
        assert triton.race(logits[part], keys[part], temperatures[part]) == found[i]


def test_the_first_of_equals_wins() -> None:
    logits = torch.zeros(2, 2500)
    logits[0, [1800, 2300]] = logits[1, [0, 1023, 1024]] = 1.0
    keys = torch.zeros(2, dtype=torch.int64)
    assert triton.race(logits, keys, torch.zeros(2)).tolist() == [1800, 0]
    assert triton.race(torch.full((1, 2500), -torch.inf), keys[:1]).tolist() == [0]


def test_what_is_left_out_is_torchs() -> None:
    kernels = triton.TritonKernels(without=triton.FUSED)
    x = random(3, 64, dtype=torch.bfloat16)
    assert not kernels.used
    assert torch.equal(kernels.silu_mul(x), TORCH.silu_mul(x))
    assert torch.equal(kernels.rms_norm(x, x[0], EPS), TORCH.rms_norm(x, x[0], EPS))


def test_kernels_of_few_rows_are_launched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the kernel in front, if the device can; those of many rows are not."""
    seen: list[tuple[bool, bool]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, DEPENDENT, launch_pdl=False, **rest: seen.append((DEPENDENT, launch_pdl))

    monkeypatch.setattr(triton.triton_rows, "gate_rows", Kernel())
    for dependent in (False, True):
        for rows in (64, 65):
            triton.TritonKernels(dependent=dependent).silu_mul(torch.zeros(rows, 32))
    assert seen == [(False, False), (False, False), (True, True), (False, False)]
