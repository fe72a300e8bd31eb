"""Quantizing float32 into blocks, against the gguf package's own rounding and dequantization."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pilotfish.engine.kernels import native
from pilotfish.engine.kernels.native import NativeKernels
from tests.engine.kernels.test_blocks import WAYS, dequantized, random_blocks
from tests.support.native import needs_native

Kind = gguf.GGMLQuantizationType
KINDS = (Kind.Q8_0, Kind.Q4_1)

pytestmark = needs_native


def misses(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared errors of each group of 32."""
    return (found - wanted).double().square().view(-1, 32).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    power=st.integers(-5, 3),
    offset=st.sampled_from([0.0, 0.5, -3.0]),
    shape=st.sampled_from(["normal", "heavy", "uniform", "few"]),
    way=st.sampled_from(WAYS),
)
def test_int4_misses_less_than_rounding(
    seed: int, power: int, offset: float, shape: str, way: tuple[int, bool]
) -> None:
    source = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 320, generator=source)
    if shape == "heavy":
        matrix = matrix**3
    if shape == "uniform":
        matrix = torch.rand(5, 320, generator=source)
    if shape == "few":
        matrix = matrix.round()
    matrix = (matrix + offset) * 10.0**power
    assume(matrix.abs().max() < torch.finfo(torch.float16).max)  # what a block's minimum can be
    found = dequantized(NativeKernels(*way).quantize_blocks("w", matrix, Kind.Q4_1))
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(matrix.numpy(), Kind.Q4_1), Kind.Q4_1))
    ours, theirs = misses(found, matrix), misses(rounded, matrix)
    # Scale and minimum are rounded to float16 after they are fitted, which can take a little of it back.
    digits = (matrix.double().abs().view(-1, 32).amax(1) * 2.0**-10 + 15 * 2.0**-24).square() * 32
    assert (ours <= theirs + digits).all()
    if shape == "normal" and offset == 0:
        assert ours.sum() < 0.85 * theirs.sum()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_int8_is_off_by_half_a_step(way: tuple[int, bool]) -> None:
    matrix = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    matrix[2] = 0
    found = dequantized(NativeKernels(*way).quantize_blocks("w", matrix, Kind.Q8_0))
    step = matrix.view(-1, 32).abs().amax(1) / 127
    off = (found - matrix).view(-1, 32).abs().amax(1)
    assert (off <= step * (0.5 + 127 * 2.0**-11) + 1e-7).all(), "a scale has the digits of float16"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_was_in_blocks_stays_what_it_was(kind: Kind) -> None:
    """A model that was dequantized becomes the model that it was: int4 finds the grid of values that use all codes."""
    kernels = NativeKernels()
    blocks = kernels.quantize_blocks("w", torch.randn(20, 512), kind)
    if kind == Kind.Q4_1:
        blocks = random_blocks(kind, 20, 512)
        blocks.rows.view(20, 16, 20)[:, :, 4] = 0xF0
    wanted = dequantized(blocks)
    found = dequantized(kernels.quantize_blocks("w", wanted, kind))
    spread = wanted.view(-1, 32).amax(1) - wanted.view(-1, 32).amin(1)
    assert (misses(found, wanted) <= 32 * (spread * 2.0**-9).double().square() + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_depends_on_its_own_values_alone(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(21, 352).to(dtype)
    matrix[3, 32:96] = 0.25
    matrix[4] = 0
    found = {way: NativeKernels(*way).quantize_blocks("w", matrix, kind).rows for way in WAYS if way[0] > 0}
    first = NativeKernels().quantize_blocks("w", matrix, kind)
    assert all(torch.equal(rows, first.rows) for rows in found.values())
    assert torch.allclose(dequantized(first)[3:5, 64:96], matrix[3:5, 64:96].float(), rtol=1e-3, atol=0)
    for rows in ((0, 1), (3, 4), (5, 21)):
        alone = NativeKernels().quantize_blocks("w", matrix[slice(*rows)], kind)
        assert torch.equal(alone.rows, first.rows[slice(*rows)])
    monkeypatch.setattr(native, "QUANTIZED_AT_A_TIME", 1000)
    assert torch.equal(NativeKernels().quantize_blocks("w", matrix, kind).rows, first.rows)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e8])
def test_what_float16_scales_cannot_hold_is_refused_with_the_tensors_name(kind: Kind, value: float) -> None:
    matrix = torch.randn(20, 64)
    matrix[17, 40] = value
    kernels = NativeKernels()
    with pytest.raises(ValueError, match="'some' has a block whose scale is not a finite number"):
        kernels.prepare_blocks([kernels.quantize_blocks("some", matrix, kind)])
