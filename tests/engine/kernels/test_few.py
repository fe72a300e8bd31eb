"""Products of a matrix with few rows, in Triton's interpreter: against float64, torch's operators, and their definition
in fp8. That a row has the same bits among any rows is the tensor cores' doing, and checked on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.tools.selftest.precision import units

few = pytest.importorskip("pilotfish.engine.kernels.few")
triton = pytest.importorskip("pilotfish.engine.kernels.triton")

CPU = torch.device("cpu")
TORCH = TorchKernels()
PLAIN = {"DEPENDENT": False}
HALF = [torch.bfloat16, torch.float16]
some = settings(max_examples=12, deadline=None)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counters() -> torch.Tensor:
    return torch.zeros(64, dtype=torch.int32)


@some
@given(
    st.sampled_from(HALF),
    st.integers(1, 64),
    st.integers(1, 12),  # outputs, in 16
    st.integers(1, 80),  # depth, in 8
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([16, 64]),
)
def test_products(dtype, rows, outputs, depth, splits, biased, tile) -> None:
    """Rounded once, from a sum in float32, whatever the sizes and the splits."""
    x, weight = random(rows, 8 * depth, dtype=dtype), random(16 * outputs, 8 * depth, dtype=dtype, seed=1)
    bias = random(16 * outputs, dtype=dtype, seed=2) if biased else None
    arrived = counters()
    found = few.multiply(x, weight, bias, few.Tiling(tile, 64, splits), arrived, PLAIN)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert units(found, exact, dtype) <= 0.51
    assert not arrived.any()


@some
@given(st.integers(1, 33), st.integers(1, 6), st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_products_in_fp8(rows, outputs, depth, splits, biased) -> None:
    x, scales = quantize(random(rows, 16 * depth))
    weight, each = quantize(random(16 * outputs, 16 * depth, seed=1))
    bias = random(16 * outputs, dtype=torch.bfloat16, seed=2) if biased else None
    tiling = few.Tiling(64, 128, splits)
    found = few.multiply(x, weight, bias, tiling, counters(), PLAIN, (scales, each), torch.bfloat16)
    exact = (x.double() @ weight.double().T) * scales.double() * each.double().T
    rounded = exact.to(torch.bfloat16).double() + (0 if bias is None else bias.double())
    assert units(found, rounded, torch.bfloat16) <= (1.51 if biased else 0.51)


@pytest.mark.parametrize("gate", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gates_are_those_of_the_rows_kernel(dtype: torch.dtype, gate: str) -> None:
    """To the bit, also where the gates do not fill the last tile and have a bias."""
    x, weight = random(5, 96, dtype=dtype), random(2 * 80, 96, dtype=dtype, seed=1)
    bias = random(2 * 80, dtype=dtype, seed=2)
    tiling = few.Tiling(32, 64)
    both = few.multiply(x, weight, bias, tiling, counters(), PLAIN)
    fused = triton.TritonKernels()
    wanted = fused.silu_mul(both) if gate == "silu" else fused.gelu_mul(both)
    assert torch.equal(few.multiply(x, weight, bias, tiling, counters(), PLAIN, gate=gate), wanted)


def test_splits_are_summed_in_their_order() -> None:
    """The last program to arrive adds all parts in float32, from the first to the last."""
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    weight = torch.zeros(16, 1024, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 256], weight[:, 512], weight[:, 768] = 2.0**30, 1.0, -(2.0**30), 3.0
    found = few.multiply(x, weight, None, few.Tiling(16, 64, 4), counters(), PLAIN)
    assert found.unique().tolist() == [3.0]  # the 1 is lost beside 2**30


@pytest.mark.parametrize("fp8", [False, True])
def test_linears(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are taken and more are torch's, with a residual, a bias, and rows that are not contiguous."""
    monkeypatch.setattr(few, "SMALLEST", 0)
    kernels = triton.TritonKernels(few=CPU)
    assert "few" in kernels.used
    assert kernels.name == "triton"
    calls: list[int] = []
    multiply = few.multiply

    def counted(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append(len(x))
        return multiply(x, *rest, **named)

    monkeypatch.setattr(few, "multiply", counted)
    weight, bias = random(64, 256, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    stored, scale = quantize(weight) if fp8 else (weight, None)
    prepared = TORCH.prepare_linear(stored, bias, scale)
    for rows in (1, 17, 64, 65):
        x = random(rows, 300, dtype=torch.bfloat16, seed=rows)[:, 20:276]
        residual = random(rows, 64, dtype=torch.bfloat16, seed=3)
        found, wanted = (each.linear(x, prepared, residual.clone()) for each in (kernels, TORCH))
        assert units(found, wanted.double(), torch.bfloat16) <= 2
        found, wanted = (each.gated_linear(x, prepared, "silu") for each in (kernels, TORCH))
        assert units(found, wanted.double(), torch.bfloat16) <= 4
    assert calls == [1, 1, 17, 17, 64, 64]


def test_what_is_not_taken() -> None:
    product = few.FewRows(CPU, PLAIN)
    wide = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    assert product.takes(wide[:3], wide, None)
    assert not product.takes(wide[:65], wide, None)
    assert not product.takes(wide[:0], wide, None)
    assert not product.takes(wide[:3, :4], wide[:, :4], None)  # rows of 8 bytes
    assert not product.takes(wide[:3, :64], wide[:64, :64], None)  # too small
    assert not product.takes(wide[:3].float(), wide.float(), None)


@given(
    st.integers(1, 8000), st.integers(1, 1000), st.sampled_from([1, 2]), st.sampled_from([16, 32, 64]), st.booleans()
)
def test_tilings(outputs, depth, itemsize, padded, gated) -> None:
    """They fit a multiprocessor's shared memory, and splits do not depend on the rows."""
    tiling = few.tiling_of(16 * outputs, 16 * depth, itemsize, padded, gated)
    rows = tiling.outputs * (2 if gated else 1) + padded
    assert tiling.stages * rows * tiling.depth * itemsize <= 227 << 10
    assert tiling.depth * itemsize >= 128
    assert tiling.outputs % 64 == 0  # of one kind of the tensor cores' products
    assert not gated or tiling.splits == 1
    assert tiling.splits == few.tiling_of(16 * outputs, 16 * depth, itemsize, 16, gated).splits
