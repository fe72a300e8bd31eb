"""Both decoders give the same bits, and the rule that chooses between them sends what the fused one does not know to
the operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.native import NativeKernels, load_library
from pilotfish.engine.kernels.protocol import PreparedLinear
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.choose import choose_decoder, why_not_fused
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import Decoder, DecoderLayer, DenseMlp, Linears
from pilotfish.engine.layers.fused_decoder import FusedDecoder
from pilotfish.engine.layers.operator_decoder import OperatorDecoder
from pilotfish.engine.models.config import Eagle3Config, ModelConfig, RopeConfig
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.models.eagle3_checkpoint import optional, tensors_of
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.weights.int8 import quantize
from pilotfish.engine.weights.quantization import SCALE
from tests.support.parity import BLOCKS, OTHERS, runner_of
from tests.support.tiny import KINDS, UNFUSED

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native kernels were not built (no C compiler)")

CPU = torch.device("cpu")
LENGTHS = st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(any)
"""Rows of each of two sequences in a step."""


def by_operators(decoder: Decoder) -> OperatorDecoder:
    kernels = NativeKernels()
    return OperatorDecoder(kernels, NativeAttention(kernels), ALONE, decoder.layers, decoder.shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNFUSED])
def test_a_models_layers(tiny: Callable[[str], Path], kind: str) -> None:
    fused, apart = (runner_of(str(tiny(kind)), "native") for _ in range(2))
    count = fused.model.config.num_layers
    assert isinstance(fused.model.decoder, FusedDecoder)
    apart.model.decoder = by_operators(apart.model.decoder)

    @settings(deadline=None)
    @given(st.lists(LENGTHS, min_size=1, max_size=3), st.sets(st.integers(0, count)), st.integers(0, 1000))
    def check(steps: list[tuple[int, int]], layers: set[int], seed: int) -> None:
        generator, done = torch.Generator().manual_seed(seed), [0, 0]
        for lengths in steps:
            spans = []
            for i, (length, blocks) in enumerate(zip(lengths, (BLOCKS, OTHERS), strict=True)):
                tokens = torch.randint(512, (length,), generator=generator).tolist()
                if length:
                    spans.append(Span(tokens, done[i], blocks, length))
                done[i] += length
            found = [FeatureTap(sorted(layers)) for _ in range(2)]
            assert same(fused.run(spans, found[0]), apart.run(spans, found[1]))
            if layers:
                assert same(found[0].features, found[1].features)
        for one, other in zip(fused._caches, apart._caches, strict=True):
            assert same(one.keys, other.keys)
            assert same(one.values, other.values)

    check()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_a_heads_layer(int8: bool, qk_norm: bool, norm_before_residual: bool) -> None:
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
    model = Eagle3Model(config, kernels, attention, random_weights(config, int8), 128, CPU, torch.float32, shared)
    assert isinstance(model.decoder, FusedDecoder)

    def run(hidden: torch.Tensor) -> tuple[list[torch.Tensor], LayerCache]:
        cache = attention.allocate(8, 16, 2, 16, torch.float32, CPU)
        out, start = [], 0
        for length in (21, 1, 5):
            batch = flatten([Span([start + i for i in range(length)], start, BLOCKS)], 16, CPU)
            rows = hidden[start : start + length]
            out.append(model.forward(rows, batch.arrays.token_ids, batch.arrays.positions, batch.attention, cache))
            start += length
        assert torch.equal(hidden, before)
        return out, cache

    hidden = torch.randn(27, 48)
    before = hidden.clone()
    fused, cache = run(hidden)
    model.decoder = by_operators(model.decoder)
    apart, other = run(hidden)
    assert all(same(one, two) for one, two in zip(fused, apart, strict=True))
    assert same(cache.keys, other.keys)
    assert same(cache.values, other.values)


def random_weights(config: Eagle3Config, int8: bool) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in tensors_of(config).items():
        if name in optional(config):
            continue
        if tensor.linear is None:
            weights[name] = torch.ones(48) if name == "norm.weight" else torch.rand(tensor.shape) + 0.5
            continue
        weights[name] = torch.randn(tensor.shape) / tensor.shape[1] ** 0.5
        if int8:
            weights[name], weights[name + SCALE] = quantize(weights[name])
    return weights


# Layers that the fused decoder does not know


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapter of the linears in `deltas`, (down (rank, in_features), up (out_features, rank)) each, for the rows of
    every span but the batch's first."""

    deltas: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def add_(self, name: str, x: torch.Tensor, y: torch.Tensor, batch: AttentionBatch) -> None:
        if name in self.deltas:
            down, up = self.deltas[name]
            first = batch.query_lens[0]
            y[first:] += x[first:] @ down.T @ up.T


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The average of two gated MLPs, as experts that every row visits."""

    experts: tuple[DenseMlp, DenseMlp]

    def forward(self, linears: Linears, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        one, two = (expert.forward(linears, x, None) for expert in self.experts)
        mean = (one + two) / 2
        return mean if residual is None else residual + mean


@dataclasses.dataclass(frozen=True)
class Repacked:
    """A linear as kernels to come may lay it out."""

    in_features: int
    out_features: int


SPANS = [Span([1, 2, 3, 4], 0, BLOCKS, 4), Span([5, 6, 7, 8, 9], 0, OTHERS, 5)]


def with_layers(runner: Any, change: Callable[[DecoderLayer], DecoderLayer]) -> Decoder:
    """Put changed layers in the place of the runner's, by the decoder that the rule chooses."""
    kernels = runner.model._kernels
    attention = NativeAttention(kernels) if isinstance(kernels, NativeKernels) else TorchAttention()
    old = runner.model.decoder
    runner.model.decoder = choose_decoder(kernels, attention, ALONE, [change(layer) for layer in old.layers], old.shape)
    return runner.model.decoder


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("names", [{"qkv"}, {"output"}, {"gate_up"}, {"down"}, {"qkv", "output", "gate_up", "down"}])
def test_an_adapter_is_a_change_of_weights_and_leaves_other_rows_their_bits(
    tiny: Callable[[str], Path], kind: str, names: set[str]
) -> None:
    native, reference = runner_of(str(tiny(kind)), "native"), runner_of(str(tiny(kind)), "torch")
    plain = native.run(SPANS).clone()
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    layers = native.model.decoder.layers
    chosen = [{name: linears(layer)[name] for name in names} for layer in layers]
    deltas = [
        {name: (random(2, linear.in_features), random(linear.out_features, 2)) for name, linear in each.items()}
        for each in chosen
    ]
    adapters = dict(zip(map(id, layers), map(LowRank, deltas), strict=True))
    decoder = with_layers(native, lambda layer: dataclasses.replace(layer, adapter=adapters[id(layer)]))
    assert isinstance(decoder, OperatorDecoder)
    found = native.run(SPANS)
    assert same(found[:4], plain[:4])

    changes = iter(deltas)

    def changed(layer: DecoderLayer) -> DecoderLayer:
        for name, (down, up) in next(changes).items():
            linears(layer)[name].weight.add_(up @ down)
        return layer

    with torch.inference_mode():
        with_layers(reference, changed)
    wanted = reference.run(SPANS)
    assert (wanted[4:] - plain[4:]).abs().max() > 0.1
    torch.testing.assert_close(found[4:], wanted[4:], rtol=1e-3, atol=1e-3)


def linears(layer: DecoderLayer) -> dict[str, Any]:
    assert isinstance(layer.mlp, DenseMlp)
    return {"qkv": layer.qkv, "output": layer.output, "gate_up": layer.mlp.gate_up, "down": layer.mlp.down}


def dense(layer: DecoderLayer) -> DenseMlp:
    assert isinstance(layer.mlp, DenseMlp)
    return layer.mlp


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_another_mlp_goes_to_the_operators_and_is_used(tiny: Callable[[str], Path], kind: str) -> None:
    runner, reference = runner_of(str(tiny(kind)), "native"), runner_of(str(tiny(kind)), "torch")
    plain = runner.run(SPANS).clone()

    def mixed(kernels: Any, layer: DecoderLayer) -> DecoderLayer:
        mlp, generator = dense(layer), torch.Generator().manual_seed(3)

        def random(like: PreparedLinear) -> PreparedLinear:
            return kernels.prepare_linear(0.1 * torch.randn(like.out_features, like.in_features, generator=generator))

        other = DenseMlp(random(mlp.gate_up), random(mlp.down), mlp.gate)
        return dataclasses.replace(layer, mlp=Mixture((mlp, other)))

    decoder = with_layers(runner, lambda layer: mixed(runner.model._kernels, layer))
    assert isinstance(decoder, OperatorDecoder)
    with_layers(reference, lambda layer: mixed(TorchKernels(), layer))
    found, wanted = runner.run(SPANS), reference.run(SPANS)
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    # The average of an MLP and itself is that MLP.
    itself = runner_of(str(tiny(kind)), "native")
    with_layers(itself, lambda layer: dataclasses.replace(layer, mlp=Mixture((dense(layer), dense(layer)))))
    torch.testing.assert_close(itself.run(SPANS), plain, rtol=1e-4, atol=1e-4)


class Twin:
    """Two ranks that hold the same."""

    rank, size = 0, 2

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], dim=1)


@pytest.mark.parametrize("residual", [None, torch.full((9, 4), 5.0)])
def test_an_adapter_changes_a_ranks_summand_and_the_residual_is_added_once(residual: torch.Tensor | None) -> None:
    kernels, generator = TorchKernels(), torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 6, generator=generator), torch.randn(4, 6, generator=generator)
    down, up = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    batch = flatten(SPANS, 16, CPU).attention
    adapter = LowRank({"down": (down, up)})
    linears = Linears(kernels, Twin(), adapter, batch)
    found = linears.summed("down", x, kernels.prepare_linear(weight), residual)
    wanted = 2 * (x @ weight.T)
    wanted[4:] += 2 * (x[4:] @ down.T @ up.T)
    torch.testing.assert_close(found, wanted if residual is None else wanted + residual)


def test_the_rule_names_what_the_fused_decoder_does_not_know(tiny: Callable[[str], Path]) -> None:
    kernels = NativeKernels()
    attention = NativeAttention(kernels)
    layers = runner_of(str(tiny("qwen3")), "native").model.decoder.layers
    assert why_not_fused(kernels, attention, ALONE, layers) is None

    def reason(**changes: Any) -> str:
        found = why_not_fused(kernels, attention, ALONE, [layers[0], dataclasses.replace(layers[1], **changes)])
        assert found is not None
        return found

    scale, mlp = layers[0].attention.scale, dense(layers[1])
    assert reason(adapter=LowRank({})) == "layer 1 has an adapter"
    assert reason(mlp=Mixture((mlp, mlp))) == "layer 1 has an MLP that is not dense (Mixture)"
    assert reason(output=Repacked(64, 64)) == "layer 1 has a linear of another kind (Repacked)"
    other = dataclasses.replace(mlp, down=Repacked(64, 64))
    assert reason(mlp=other) == "layer 1 has a linear of another kind (Repacked)"
    assert reason(q_norm=None) == "layer 1 has a norm of query or key alone"
    assert reason(attention=AttentionParams(scale, softcap=30.0)) == "layer 1 caps attention scores"
    assert "scale" in reason(attention=AttentionParams(2 * scale))
    assert "gate" in reason(mlp=dataclasses.replace(mlp, gate="gelu"))
    assert why_not_fused(kernels, attention, Twin(), layers) == "the model is sharded over 2 ranks"
    assert "'torch'" in (why_not_fused(TorchKernels(), attention, ALONE, layers) or "")
    assert "attention backend is 'torch'" in (why_not_fused(kernels, TorchAttention(), ALONE, layers) or "")


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Bit by bit, so that NaN where nobody has written is NaN."""
    assert one is not None
    assert other is not None
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
