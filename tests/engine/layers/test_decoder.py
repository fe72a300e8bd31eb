"""A decoder's layers in one call give what the operators give one by one, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.native import NativeKernels, load_library
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.models.config import Eagle3Config, ModelConfig, RopeConfig
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.models.features import FeatureTap
from tests.support.parity import BLOCKS, OTHERS, runner_of
from tests.support.tiny import KINDS

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native kernels were not built (no C compiler)")

CPU = torch.device("cpu")
LENGTHS = st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(any)
"""Rows of each of two sequences in a step."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_layers(tiny: Callable[[str], Path], kind: str) -> None:
    whole, apart = (runner_of(str(tiny(kind)), "native") for _ in range(2))
    count = whole.model.config.num_layers
    assert whole.model.at_once is not None
    apart.model.at_once = None

    @given(st.lists(LENGTHS, min_size=1, max_size=3), st.sets(st.integers(0, count)), st.integers(0, 1000))
    def check(steps: list[tuple[int, int]], layers: set[int], seed: int) -> None:
        generator, done = torch.Generator().manual_seed(seed), [0, 0]
        for lengths in steps:
            spans = []
            for place, (length, blocks) in enumerate(zip(lengths, (BLOCKS, OTHERS), strict=True)):
                tokens = torch.randint(512, (length,), generator=generator).tolist()
                if length:
                    spans.append(Span(tokens, done[place], blocks, length))
                done[place] += length
            found = [FeatureTap(sorted(layers)) for _ in range(2)]
            assert same(whole.run(spans, found[0]), apart.run(spans, found[1]))
            if layers:
                assert same(found[0].features, found[1].features)
        for one, other in zip(whole._caches, apart._caches, strict=True):
            assert same(one.keys, other.keys)
            assert same(one.values, other.values)

    check()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_a_head_s_layer(int8: bool, qk_norm: bool, norm_before_residual: bool) -> None:
    decoder = ModelConfig(
        architecture="llama",
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
        qk_norm=qk_norm,
    )
    config = Eagle3Config(
        decoder=decoder,
        draft_vocab_size=64,
        target_hidden_size=48,
        feature_layers=(0, 1, 2),
        norm_before_residual=norm_before_residual,
    )
    kernels, attention = NativeKernels(), NativeAttention(NativeKernels())
    embedding = kernels.prepare_linear(torch.randn(64, 48))
    shared = SharedWeights(embedding, embedding)
    model = Eagle3Model(config, kernels, attention, random_weights(int8), 128, CPU, torch.float32, shared)
    assert model.at_once is not None

    def run(hidden: torch.Tensor) -> tuple[list[torch.Tensor], LayerCache]:
        cache = attention.allocate(8, 16, 2, 16, torch.float32, CPU)
        out, start = [], 0
        for length in (21, 1, 5):
            batch = flatten([Span([start + i for i in range(length)], start, BLOCKS)], 16, CPU)
            rows = hidden[start : start + length]
            out.append(model.forward(rows, batch.token_ids, batch.positions, batch.attention, cache))
            start += length
        return out, cache

    hidden = torch.randn(27, 48)
    before = hidden.clone()
    whole, cache = run(hidden)
    assert torch.equal(hidden, before)
    model.at_once = None
    apart, other = run(hidden)
    assert all(same(one, two) for one, two in zip(whole, apart, strict=True))
    assert same(cache.keys, other.keys)
    assert same(cache.values, other.values)


def random_weights(int8: bool) -> dict[str, torch.Tensor]:
    shapes = {"fc": (48, 144), "layer.self_attn.q_proj": (64, 96), "layer.self_attn.o_proj": (48, 64)}
    shapes |= {f"layer.self_attn.{name}_proj": (32, 96) for name in "kv"}
    shapes |= {f"layer.mlp.{name}_proj": (96, 48) for name in ("gate", "up")} | {"layer.mlp.down_proj": (48, 96)}
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape) / shape[1] ** 0.5
        if int8:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[f"{name}.weight_scale"], weight = scale, (weight / scale).round().to(torch.int8)
        weights[f"{name}.weight"] = weight
    for name, size in {"input_layernorm": 48, "hidden_norm": 48, "post_attention_layernorm": 48}.items():
        weights[f"layer.{name}.weight"] = torch.rand(size) + 0.5
    for name in "qk":
        weights[f"layer.self_attn.{name}_norm.weight"] = torch.rand(16) + 0.5
    return weights | {"norm.weight": torch.ones(48)}


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Bit by bit, so that NaN where nobody has written is NaN."""
    assert one is not None
    assert other is not None
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
