"""Matrices in the quantized blocks of GGUF files, against the gguf package's own dequantization."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES

from pilotfish.engine.kernels.native import NativeKernels, load_library
from pilotfish.engine.weights.blocks import KINDS, Blocks
from tests.support.native import BUILT, needs_native

Kind = gguf.GGMLQuantizationType

pytestmark = needs_native


def _ways() -> list[Any]:
    """Every way to multiply bytes that this processor has: level, and whether by VNNI."""
    library = load_library()
    if not BUILT or library is None:
        return [(0, False)]
    return [
        (level, vnni)
        for level in range(library.pilotfish_level() + 1)
        for vnni in ((False, True) if library.pilotfish_vnni(level) else (False,))
    ]


WAYS = _ways()
HALVES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2)}
"""Where a block has its float16 numbers, if not at its start alone."""


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> Blocks:
    """Blocks of random bits, extremes included, with scales between -2 and 2, some of them zero."""
    source = np.random.default_rng(seed)
    values, size = GGML_QUANT_SIZES[kind]
    raw = source.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for byte in (0, 255):
        raw[source.random(raw.shape[:2]) < 0.1] = byte
    for at in HALVES.get(kind, (0,)):
        scales = source.uniform(-2, 2, raw.shape[:2]).astype(np.float16)
        scales[source.random(scales.shape) < 0.1] = 0
        raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return Blocks("blk.0.some.weight", kind, torch.from_numpy(raw.reshape(rows, -1)))


def dequantized(blocks: Blocks) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.rows.numpy(), blocks.kind))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels round them: 8 bits for each group of 32."""
    groups = x.view(len(x), -1, 32)
    scale = groups.abs().amax(2, keepdim=True) / 127
    return (torch.where(scale > 0, groups / scale, 0.0).round() * scale).view(x.shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [16, 37])
def test_a_row_is_what_the_gguf_package_makes_of_it(kind: Kind, columns: int) -> None:
    blocks = random_blocks(kind, columns, 512)
    prepared = NativeKernels().prepare_blocks([blocks])
    ids = torch.tensor([0, columns - 1, 3, 3, 15])
    assert torch.equal(NativeKernels().embed(ids, prepared), dequantized(blocks)[ids])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_product_is_that_of_the_dequantized_matrix(kind: Kind, way: tuple[int, bool]) -> None:
    """And a row's result does not depend on the rows beside it, to the last bit."""
    kernels = NativeKernels(*way)
    source = torch.Generator().manual_seed(1)
    for columns, size in ((16, 256), (40, 512), (77, 768)):
        blocks = random_blocks(kind, columns, size)
        x = torch.randn(23, size, generator=source) * torch.logspace(-3, 3, 23)[:, None]
        x[3, :64] = 0
        bias, residual = torch.randn(columns, generator=source), torch.randn(23, columns, generator=source)
        prepared = kernels.prepare_blocks([blocks], bias)
        found = kernels.linear(x, prepared, residual)
        exact = rounded(x).double() @ dequantized(blocks).double().T
        sizes = rounded(x).double().abs() @ dequantized(blocks).double().abs().T
        # Rounding of float32 sums; and codes of activations that lie between two may go either way.
        assert ((found - (exact + bias + residual)).abs() <= 2e-3 * sizes + 1e-4).all()
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 12, 17):
            assert torch.equal(kernels.linear(x[:rows], prepared, residual[:rows]), found[:rows])
            assert torch.equal(kernels.linear(x[-rows:], prepared, residual[-rows:]), found[-rows:])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_are_summed_exactly(kind: Kind) -> None:
    """Activations that are whole numbers up to 127 are their own codes, so only the float32 sums round."""
    source = torch.Generator().manual_seed(2)
    blocks = random_blocks(kind, 48, 512)
    x = torch.randint(-127, 128, (9, 512), generator=source).float()
    x[:, ::32] = 127
    x[:, 1::32] = -127
    exact = x.double() @ dequantized(blocks).double().T
    sizes = x.double().abs() @ dequantized(blocks).double().abs().T
    for way in WAYS:
        kernels = NativeKernels(*way)
        found = kernels.linear(x, kernels.prepare_blocks([blocks]))
        assert ((found - exact).abs() <= 2e-6 * sizes).all(), way


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_ways_with_the_same_registers_of_floats_agree(kind: Kind) -> None:
    blocks, x = random_blocks(kind, 64, 512), torch.randn(5, 512)
    fused = [NativeKernels(*way) for way in WAYS if way[0] > 0]
    found = [kernels.linear(x, kernels.prepare_blocks([blocks])) for kernels in fused]
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_matrix_of_many_kinds() -> None:
    """Neighbours of one kind are joined where panels allow it, and rows of float32 may lie between."""
    parts: list[torch.Tensor | Blocks] = [
        random_blocks(Kind.Q5_0, 32, 256),
        random_blocks(Kind.Q5_0, 20, 256, 1),
        random_blocks(Kind.Q5_0, 16, 256, 2),
        torch.randn(24, 256),
        random_blocks(Kind.Q8_0, 17, 256, 3),
    ]
    kernels = NativeKernels()
    bias, x, residual = torch.randn(109), torch.randn(11, 256), torch.randn(11, 109)
    together = kernels.prepare_blocks(parts, bias)
    assert [(part.first, part.columns) for part in together.parts] == [(0, 52), (52, 16), (68, 24), (92, 17)]
    found, first = kernels.linear(x, together, residual), 0
    for part in parts:
        last = first + part.shape[0]
        alone = kernels.prepare_blocks([part], bias[first:last])
        assert torch.equal(found[:, first:last], kernels.linear(x, alone, residual[:, first:last]))
        first = last


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_refused_with_the_tensors_name(kind: Kind, value: float) -> None:
    for at in HALVES.get(kind, (0,)):
        blocks = random_blocks(kind, 20, 512)
        bytes_ = GGML_QUANT_SIZES[kind][1] + at
        blocks.rows[17, bytes_ : bytes_ + 2] = torch.from_numpy(np.array([value], dtype=np.float16).view(np.uint8))
        with pytest.raises(ValueError, match=r"'blk\.0\.some\.weight' has a block whose scale is not a finite number"):
            NativeKernels().prepare_blocks([blocks])
