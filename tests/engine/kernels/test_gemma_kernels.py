"""The native kernels for Gemma: GELU's gate equals torch's over its whole range and is batch-invariant; wide heads."""

import pytest
import torch

from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.tools.selftest.reference import ReferenceKernels

EXACT = ReferenceKernels()
SIZES = (640, 2048)
"""Gemma 3 270m's."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [16, 48, *SIZES])
def test_gelu_mul_equals_its_formula(kernels, size):
    gate_up = random(9, 2 * size) * 4
    wanted = EXACT.gelu_mul(gate_up).float()
    torch.testing.assert_close(kernels.gelu_mul(gate_up), wanted, rtol=2e-6, atol=1e-6)
    # torch adds 1 to a tanh near -1, and so loses what is left of it, relative to the gate's 16 and what it multiplies.
    torch.testing.assert_close(TorchKernels().gelu_mul(gate_up), wanted, rtol=2e-6, atol=4e-6)


def test_gelu_over_its_range(kernels):
    """Relative to its own size even where 1 + tanh would have lost every digit, and right where exp overflows."""
    x = torch.cat([torch.linspace(-12, 40, 4001), torch.tensor([-1e30, -1e20, -60.0, 1e20, 1e30, 0.0, -0.0, 1e-30])])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    gate_up = torch.cat([x, torch.ones_like(x)])[None]
    found, wanted = kernels.gelu_mul(gate_up)[0], EXACT.gelu_mul(gate_up)[0].float()
    # exp's argument is rounded before exp is: an error of up to 90 times a unit in the last place.
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-36)


@pytest.mark.parametrize("rows", [2, 9, 33])
def test_gelu_is_batch_invariant(kernels, rows):
    gate_up = random(rows, 2 * 2048) * 3
    together = kernels.gelu_mul(gate_up)
    for row in range(rows):
        assert torch.equal(kernels.gelu_mul(gate_up[row : row + 1])[0], together[row])


def test_norms_and_rotation_of_wide_heads(kernels):
    """Head size 256, and one key head: a view whose only head has the stride of all."""
    weight = 1 + 0.2 * random(256, seed=1)
    qkv = random(7, 6, 256)
    query, key, _ = qkv.split((4, 1, 1), dim=1)
    cos_sin, positions = random(50, 256, seed=3), torch.tensor([0, 3, 49, 7, 8, 9, 1])
    for heads in (query, key):
        found, wanted = (k.rms_norm(heads, weight, 1e-6) for k in (kernels, EXACT))
        torch.testing.assert_close(found, wanted.float())
        for k, x in ((kernels, found), (EXACT, wanted)):
            k.rotate_(x, positions, cos_sin)
        torch.testing.assert_close(found, wanted.float())
