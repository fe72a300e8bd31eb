"""Triton's kernels are compared with torch's operators before they are used."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution import triton_check
from pilotfish.engine.execution.platform import choose_platform
from pilotfish.engine.execution.triton_check import Sizes, checked_triton
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.errors import ConfigError

triton = pytest.importorskip("pilotfish.engine.kernels.triton")

CPU = torch.device("cpu")
SIZES = Sizes(hidden=48, intermediate=96, heads=2, kv_heads=1, head_dim=16, vocab=1500)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    for cache in (dtype, torch.float8_e4m3fn):
        kernels = checked_triton(CPU, dtype, cache, SIZES, fp8=True)
        assert isinstance(kernels, triton.TritonKernels)
        assert kernels.used == set(triton.FUSED)
        assert kernels.name == "triton"
    assert not caplog.records


def wrong_by_a_little(*args: object) -> torch.Tensor:
    gate_up = args[-1]
    assert isinstance(gate_up, torch.Tensor)
    return TorchKernels().silu_mul(gate_up) * 1.1


def does_not_compile(*_: object) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


@pytest.mark.parametrize(
    ("broken", "says"),
    [(wrong_by_a_little, r"'gate', whose numbers differ .* by up to \d+"), (does_not_compile, "C compiler")],
)
def test_one_that_fails_is_torchs(monkeypatch, caplog, broken, says: str) -> None:
    monkeypatch.setattr(triton, "_gated", lambda gate_up, gelu, launch: broken(gate_up))
    kernels = checked_triton(CPU, torch.bfloat16, torch.bfloat16, SIZES, fp8=False)
    assert isinstance(kernels, triton.TritonKernels)
    assert kernels.used == set(triton.FUSED) - {"gate"}
    assert kernels.name == "triton-gate"
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert re.search(says, record.getMessage())
    x = torch.randn(2, 64)
    assert torch.equal(kernels.silu_mul(x), TorchKernels().silu_mul(x))


def test_torchs_if_nothing_is_left(monkeypatch) -> None:
    monkeypatch.setattr(triton_check, "why_not", lambda mine, its: "which is broken")
    assert type(checked_triton(CPU, torch.float32, torch.float32, SIZES, fp8=True)) is TorchKernels


def test_nan_is_a_difference() -> None:
    ones = torch.ones(2, 3)
    assert triton_check.why_not(lambda: (ones * torch.nan,), lambda: (ones,))
    assert triton_check.why_not(lambda: (ones,), lambda: (ones,)) is None
    assert triton_check.why_not(lambda: (ones.long(),), lambda: (2 * ones.long(),))


def test_without_a_gpu_they_are_refused(tiny, monkeypatch) -> None:
    shape = read_hf_config(tiny("llama"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"kernels is 'triton', but .* NVIDIA GPUs, not on cpu"):
        choose_platform(EngineConfig(model="m", device="cpu", kernels="triton"), shape)


@pytest.mark.parametrize("broken", [False, True])
def test_products_with_few_rows(monkeypatch, caplog, broken: bool) -> None:
    """On a device that they are for they are compared, too: numbers, and a row's bits beside other rows."""
    few = pytest.importorskip("pilotfish.engine.kernels.few")
    monkeypatch.setattr(few, "can_multiply", lambda device: True)
    monkeypatch.setattr(few, "SMALLEST", 0)
    multiply = few.multiply
    if broken:  # for several rows alone
        monkeypatch.setattr(few, "multiply", lambda x, *rest, **named: multiply(x, *rest, **named) * (1 + len(x) // 64))
    kernels = checked_triton(CPU, torch.bfloat16, torch.bfloat16, SIZES, fp8=True)
    assert isinstance(kernels, triton.TritonKernels)
    assert kernels.name == ("triton-few" if broken else "triton")
    assert ("few" in kernels.used) == (not broken)
    assert [each.getMessage() for each in caplog.records if "'few', whose numbers differ" in each.getMessage()] or (
        not broken
    )
