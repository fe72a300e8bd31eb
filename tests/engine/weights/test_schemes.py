"""Schemes of quantization: what each promises, and that a new one is one entry of SCHEMES."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.weights import quantization
from pilotfish.engine.weights.quantization import SCALE, SCHEMES, Quantization, dequantized, quantized, scheme_of
from pilotfish.engine.weights.scheme import Scheme
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.models import PlannedModel
from tests.support.parity import in_pieces, runner_of

Tiny = Callable[[str], Path]
IDS = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333]
UP = "model.layers.0.mlp.up_proj.weight"
ERRORS = {"fp8": 1 / 16, "int8": 1 / 254}
"""Largest error of a number: of the number itself, or of its row's largest."""


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=30)
@given(rows=st.integers(1, 5), size=st.sampled_from([16, 48]), seed=st.integers(0, 99), power=st.integers(-6, 6))
def test_a_scheme_keeps_its_promises(name: str, rows: int, size: int, seed: int, power: int) -> None:
    scheme = SCHEMES[name]
    matrix = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    stored, scale = scheme.quantize(matrix)
    assert (stored.dtype, tuple(stored.shape)) == (scheme.dtype, (rows, size))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (rows, 1))
    assert stored.nbytes + scale.nbytes == scheme.size_bytes(rows, size)
    again = scheme.dequantize(stored, scale, torch.float32)
    assert (again - matrix).abs().max() <= ERRORS[name] * matrix.abs().max() * (1 + 1e-4)
    alone, _ = scheme.quantize(matrix[:1])
    assert torch.equal(alone.view(torch.uint8), stored[:1].view(torch.uint8)), "a row depends on the others"


def test_no_two_schemes_store_the_same_dtype() -> None:
    assert all(scheme_of(scheme.dtype) is scheme for scheme in SCHEMES.values())
    assert scheme_of(torch.bfloat16) is None


def test_only_matrices_of_layers_are_quantized_but_for_those_left_out() -> None:
    declared = {
        name: Tensor(name=name, shape=(16, 16), gguf="", axes=(None, None), quantizable=takes)
        for name, takes in {UP: True, "lm_head.weight": False}.items()
    }
    plain = [(name, torch.randn(16, 16)) for name in declared]
    found = dict(quantized(plain, declared, Quantization("int8"), torch.device("cpu")))
    assert list(found) == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight" + SCALE,
        "lm_head.weight",
    ]
    assert [tensor.dtype for tensor in found.values()] == [torch.int8, torch.float32, torch.float32]
    left = dict(quantized(plain, declared, Quantization("int8", ("mlp",)), torch.device("cpu")))
    assert all(torch.equal(left[name], tensor) for name, tensor in plain)
    # Quantized again nothing changes, dequantized it is the product.
    twice = dict(quantized(found.items(), declared, Quantization("int8"), torch.device("cpu")))
    assert all(torch.equal(twice[name], tensor) for name, tensor in found.items())
    back = dict(dequantized(found.items(), torch.float32))
    assert list(back) == list(declared)
    values, scale = (found[UP + end] for end in ("", SCALE))
    assert torch.equal(back[UP], values.float() * scale)


def e5m2(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = matrix.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 57344
    return (matrix.float() / scale).to(torch.float8_e5m2), scale


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Scheme:
    scheme = Scheme(
        name="e5m2", storage="float8_e5m2", safetensors="F8_E5M2", bytes=1, quantize=e5m2, kernels=("torch",)
    )
    monkeypatch.setitem(quantization.SCHEMES, scheme.name, scheme)
    return scheme


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_new_scheme_is_one_entry(tiny: Tiny, third: Scheme, kind: str) -> None:
    path = str(tiny(kind))
    found, plain = (in_pieces(runner_of(path, "torch", quantization=q), IDS, (7, 20)) for q in ("e5m2", "none"))
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, plain).mean() > 0.9
    shape = read_config(resolve(path))
    sizes = [
        PlannedModel(name="", shape=shape, dtype="float32", kv_dtype="float32", quantization=each).weight_bytes()
        for each in (None, Quantization("e5m2"))
    ]
    assert sizes[1] < 0.7 * sizes[0]
    name: Any = third.name
    config = EngineConfig(model=path, dtype="float32", device="cpu", kernels="native", quantization=name)
    with pytest.raises(ConfigError, match="not with weights in e5m2"):
        load_model(path, None, config, 0, lambda what, share: None)
