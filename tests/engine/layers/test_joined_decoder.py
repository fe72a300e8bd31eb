"""The joined decoder gives the bits of the operators one by one, and knows which layers it can compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.engine.execution.batch import Span
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.choose import choose_decoder, why_not_joined
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import DecoderLayer
from pilotfish.engine.layers.joined_decoder import JoinedDecoder
from pilotfish.engine.layers.operator_decoder import OperatorDecoder
from pilotfish.engine.models.features import FeatureTap
from tests.support.parity import BLOCKS, OTHERS, DecoderRunner, runner_of
from tests.support.tiny import KINDS

APART = ("granite", "olmo2")
"""Kinds that run operator by operator."""
Steps = list[list[tuple[int, int, list[int]]]]
STEPS: Steps = [[(11, 0, BLOCKS)], [(1, 11, BLOCKS), (20, 0, OTHERS)], [(5, 12, BLOCKS), (1, 20, OTHERS)]]


class JoiningKernels(TorchKernels):
    """torch's operators, for which the joined decoder is chosen."""

    fuses = True


SHORT: Steps = [[(3, 0, BLOCKS)], [(1, 3, BLOCKS), (2, 0, OTHERS)]]


def logits_of(runner: DecoderRunner, steps: Steps = STEPS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and features of a few steps over two sequences."""
    generator, logits, features = torch.Generator().manual_seed(3), [], []
    for step in steps:
        spans = [
            Span(torch.randint(500, (length,), generator=generator).tolist(), start, blocks, length)
            for length, start, blocks in step
        ]
        tap = FeatureTap((0, 1, runner.model.config.num_layers))
        logits.append(runner.run(spans, tap))
        assert tap.features is not None
        features.append(tap.features)
    return logits, features


def rebuilt(runner: DecoderRunner, kind: type[Any], kernels: Any) -> DecoderRunner:
    decoder = runner.model.decoder
    runner.model.decoder = kind(kernels, TorchAttention(), ALONE, decoder.layers, decoder.shape)
    return runner


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in APART])
def test_the_same_bits(tiny: Callable[[str], Path], kind: str, dtype: str) -> None:
    both = [runner_of(str(tiny(kind)), "torch", dtype=dtype) for _ in range(2)]
    (apart, apart_features), (joined, features) = (
        logits_of(rebuilt(runner, decoder, TorchKernels()))
        for runner, decoder in zip(both, (OperatorDecoder, JoinedDecoder), strict=True)
    )
    for found, wanted in ((joined, apart), (features, apart_features)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for one, other in zip(*(runner._caches for runner in both), strict=True):
        assert torch.equal(one.keys.nan_to_num(7.0), other.keys.nan_to_num(7.0))
        assert torch.equal(one.values.nan_to_num(7.0), other.values.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule(tiny: Callable[[str], Path], kind: str) -> None:
    layers = runner_of(str(tiny(kind)), "torch").model.decoder
    chosen = choose_decoder(JoiningKernels(), TorchAttention(), ALONE, layers.layers, layers.shape)
    assert type(chosen) is (OperatorDecoder if kind in APART else JoinedDecoder)


def test_what_it_does_not_know(tiny: Callable[[str], Path]) -> None:
    (layer, *_) = runner_of(str(tiny("qwen3")), "torch").model.decoder.layers
    for changed in ({"whole_norms": True}, {"residual_scale": 0.5}, {"k_norm": None}):
        assert "layer 1" in (why_not_joined(TorchAttention(), [layer, dataclasses.replace(layer, **changed)]) or "")
    assert "layout" in (why_not_joined(NativeAttention(NativeKernels()), [layer]) or "")


def test_every_part_of_a_layer_is_known() -> None:
    """A new one is computed in `JoinedDecoder`, or refused by `why_not_joined`; then it is named here."""
    computed = {"input_norm", "qkv", "q_norm", "k_norm", "output", "attention_post_norm", "mlp_norm", "mlp"}
    computed |= {"mlp_post_norm", "cos_sin", "attention", "adapter"}
    refused = {"whole_norms", "residual_scale"}
    assert {field.name for field in dataclasses.fields(DecoderLayer)} == computed | refused


@pytest.mark.parametrize(("kind", "attention"), [("llama-biased", "torch"), ("qwen3", "triton"), ("gemma3", "torch")])
def test_models_on_triton_kernels(tiny: Callable[[str], Path], kind: str, attention: str) -> None:
    """In Triton's interpreter: logits as with torch's operators, up to rounding."""
    runner, plain = (runner_of(str(tiny(kind)), name, attention_backend="torch") for name in ("triton", "torch"))
    decoder = runner.model.decoder
    assert isinstance(decoder, JoinedDecoder)
    if attention == "triton":
        decoder._attention = pytest.importorskip("pilotfish.engine.layers.attention.triton").TritonAttention(4)
    for found, wanted in zip(logits_of(runner, SHORT)[0], logits_of(plain, SHORT)[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
