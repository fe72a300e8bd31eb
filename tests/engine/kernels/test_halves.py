"""Matrices in 16 bits: every bit of the results that the same numbers have in float32."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from pilotfish.engine.kernels.native import NativeBlocks, NativeKernels
from pilotfish.engine.weights.blocks import Blocks
from tests.engine.kernels.test_blocks import random_blocks
from tests.support.native import needs_native

pytestmark = needs_native

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 37, 64, 100])
def test_products_are_those_of_float32_to_the_last_bit(
    kernels: NativeKernels, dtype: torch.dtype, columns: int
) -> None:
    source = torch.Generator().manual_seed(columns)
    weight = (torch.randn(columns, 208, generator=source) * torch.logspace(-9, 4, 208)).to(dtype)
    weight[1, :4] = torch.tensor([torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max, 0.0, -0.0])
    bias, residual = torch.randn(columns, generator=source), torch.randn(200, columns, generator=source)
    x = torch.randn(200, 208, generator=source)
    kept, wide = kernels.prepare_linear(weight, bias), kernels.prepare_linear(weight.float(), bias)
    assert isinstance(kept, NativeBlocks)
    assert kept.packed[0].nbytes * 2 == kernels.prepare_panels(weight.float()).packed.nbytes
    for rows in (*range(1, 27), 97, 200):
        found = kernels.linear(x[:rows], kept, residual[:rows])
        assert torch.equal(found, kernels.linear(x[:rows], wide, residual[:rows])), rows
        assert torch.equal(kernels.linear(x[:rows], kept), kernels.linear(x[:rows], wide)), rows
    ids = torch.tensor([0, columns - 1, 3, 3, 1])
    assert torch.equal(kernels.embed(ids, kept), weight.float()[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_are_what_they_are(kernels: NativeKernels, dtype: torch.dtype) -> None:
    weight = torch.ones(20, 64, dtype=dtype)
    weight[3, 5], weight[4, 6], weight[5, 7] = torch.inf, -torch.inf, torch.nan
    found = kernels.linear(torch.ones(2, 64), kernels.prepare_linear(weight))
    assert found[0, 3:6].isinf().tolist() == [True, True, False]
    assert found[0, 5].isnan()
    assert (found[:, 6:] == 64).all()


def test_parts_of_all_kinds_in_one_matrix(kernels: NativeKernels) -> None:
    parts: list[torch.Tensor | Blocks] = [
        torch.randn(24, 256),
        torch.randn(20, 256).half(),
        random_blocks(Kind.Q6_K, 16, 256),
        torch.randn(9, 256).bfloat16(),
    ]
    x, together, first = torch.randn(7, 256), kernels.prepare_blocks(parts), 0
    found = kernels.linear(x, together)
    for part in parts:
        last = first + part.shape[0]
        assert torch.equal(found[:, first:last], kernels.linear(x, kernels.prepare_blocks([part])))
        first = last
