"""Rotary tables against transformers' own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from pilotfish.checkpoints.catalog import resolve
from pilotfish.checkpoints.values import Values
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import NO_ROPE, RopeConfig
from pilotfish.engine.models.readers import hf_rope
from pilotfish.engine.models.rope import cos_sin_table, inverse_frequencies, rotated_first
from pilotfish.errors import ModelError
from tests.support.parity import BLOCKS, KernelsName, runner_of
from tests.support.tiny import KINDS, build_model, make_tiny

Tiny = Callable[[str], Path]


def transformers_table(rotary: torch.nn.Module, positions: int, head_dim: int = 0, **layer: str) -> torch.Tensor:
    """`head_dim`: of a model that rotates a part of each head only."""
    cosines, sines = rotary(torch.zeros(1), torch.arange(positions)[None], **layer)
    half = cosines.shape[-1] // 2
    still = torch.zeros(positions, head_dim // 2 - half if head_dim else 0)
    return torch.cat((cosines[0, :, :half], still + 1, sines[0, :, :half], still), dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers(tiny: Tiny, kind: str) -> None:
    config = read_config(resolve(str(tiny(kind))))
    ours = cos_sin_table(config.rope, config.head_dim, config.max_position)
    assert ours.shape == (config.max_position, config.head_dim)
    assert ours.dtype == torch.float32
    rotary = build_model(kind).model.rotary_emb
    if config.local_rope is None:
        assert torch.equal(ours, transformers_table(rotary, config.max_position, config.head_dim))
        return
    nearby = cos_sin_table(config.local_rope, config.head_dim, config.max_position)
    for table, layer_type in ((ours, "full_attention"), (nearby, "sliding_attention")):
        assert torch.equal(table, transformers_table(rotary, config.max_position, layer_type=layer_type))
    assert not torch.equal(ours, nearby)


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (100000.0, 64, None),  # SmolLM2
        (500000.0, 128, (8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (500000.0, 64, (32.0, 1.0, 4.0, 8192)),  # Llama 3.2
        (1000000.0, 128, None),  # Qwen2, Qwen3
    ],
)
def test_tables_of_published_models(
    theta: float, head_dim: int, scaling: tuple[float, float, float, int] | None
) -> None:
    rope, parameters = RopeConfig(theta=theta), {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        factor, low, high, original = scaling
        rope = RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
        parameters |= {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
        parameters |= {"low_freq_factor": low, "high_freq_factor": high}
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=parameters)
    wanted = transformers_table(LlamaRotaryEmbedding(config), 4096)
    assert torch.equal(cos_sin_table(rope, head_dim, 4096), wanted)


def test_llama3_scaling_matters_in_the_tiny_models(tiny: Tiny) -> None:
    """Or else the parity of their logits would say nothing of it."""
    rope = read_config(resolve(str(tiny("llama")))).rope
    ratio = inverse_frequencies(RopeConfig(theta=rope.theta), 16) / inverse_frequencies(rope, 16)
    assert (ratio == 1).any()
    assert (ratio == 8).any()
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_ggufs_factors_give_llama3s_frequencies() -> None:
    """llama.cpp's converter stores by what each frequency is divided, in float32."""
    llama3 = RopeConfig(theta=500000.0, kind="llama3", factor=32.0)
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 64)
    factors = tuple((plain / inverse_frequencies(llama3, 64)).tolist())
    stored = RopeConfig(theta=500000.0, freq_factors=factors)
    torch.testing.assert_close(inverse_frequencies(stored, 64), inverse_frequencies(llama3, 64), rtol=3e-7, atol=0)


SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },  # as Qwen3's model cards say
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-gpt-oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "attention_factor": 1.2,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + i / 50 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
    },
    "longrope-partial": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 24,
        "long_factor": [1.0 + i for i in range(24)],
        "partial_rotary_factor": 0.75,  # Phi-4-mini
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("old", [False, True])
def test_scalings_to_the_far_end(tmp_path: Path, name: str, old: bool) -> None:
    """All 131072 positions, to the bit, from either form of config.json."""
    parameters = SCALINGS[name] | {"rope_theta": 10000.0}
    fields: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 131072}
    config = Phi3Config(**fields, pad_token_id=None)
    if "original_max_position_embeddings" in parameters:
        config.original_max_position_embeddings = parameters["original_max_position_embeddings"]
    config.rope_parameters = dict(parameters)
    wanted = transformers_table(Phi3RotaryEmbedding(config), 131072, 64)
    raw = (
        fields | {"rope_theta": 10000.0, "rope_scaling": parameters}
        if old
        else fields | {"rope_parameters": parameters}
    )
    rope = hf_rope(Values(tmp_path, raw))
    assert torch.equal(cos_sin_table(rope, 64, 131072), wanted)
    if "longrope" in name:  # the short factors, for an engine that serves short contexts only
        assert torch.equal(cos_sin_table(rope, 64, 4096), transformers_table(Phi3RotaryEmbedding(config), 4096, 64))
        assert not torch.equal(cos_sin_table(rope, 64, 4096), wanted[:4096])


def test_dynamic_scaling_goes_by_the_longest_context() -> None:
    fields: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 512}
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    rope = hf_rope(Values(Path(), fields | {"rope_parameters": parameters}))
    for length in (100, 512, 513, 2048):
        rotary = LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(parameters)))
        wanted = transformers_table(rotary, length)
        torch.testing.assert_close(cos_sin_table(rope, 64, length), wanted, rtol=0, atol=2e-4 if length > 512 else 0)


def test_the_order_of_a_head_that_is_rotated_in_part() -> None:
    """Pairs of the rotated dimensions lie half a head apart."""
    assert rotated_first(8, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert rotated_first(8, 8).tolist() == list(range(8))


def test_no_rope_leaves_everything_as_it_is() -> None:
    cosines, sines = cos_sin_table(NO_ROPE, 16, 9).chunk(2, dim=1)
    assert (cosines == 1).all()
    assert (sines == 0).all()


def test_logits_at_the_far_end(tmp_path: Path, kernels: KernelsName) -> None:
    """The last 40 positions of 131072, in a model whose layers see 8 positions: the first rows look at positions before
    them, which here hold zeros, the others do not."""
    own: dict[str, Any] = {
        "sliding_window": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": SCALINGS["yarn-deepseek"] | {"rope_theta": 10000.0},
    }
    folder, reference = make_tiny("mistral", tmp_path / "model", **own), build_model("mistral", **own)
    tokens = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
    start = 131072 - len(tokens)
    runner = runner_of(str(folder), kernels)
    for cache in runner._caches:
        cache.keys.zero_()
        cache.values.zero_()
    blocks = [0] * (131072 // 16 - 4) + BLOCKS
    found = torch.cat(
        [runner.run([Span(tokens[a:b], start + a, blocks, b - a)]) for a, b in ((0, 30), (30, 31), (31, 40))]
    )
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens]), position_ids=torch.arange(start, 131072)[None]).logits[0]
        near = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found[16:], wanted[16:], rtol=0, atol=1e-3)
    assert (wanted - near)[16:].abs().max() > 1e-2  # or else the positions would not matter


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "mrope"}, "rope_type is 'mrope', but the engine knows 'default', 'linear', 'dynamic'"),
        ({"rope_type": "linear"}, "rope scaling of type 'linear' lacks 'factor'"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, "'longrope' lacks 'short_factor'"),
    ],
)
def test_ropes_that_cannot_be_read_are_refused(parameters: dict[str, Any], named: str) -> None:
    fields = {"max_position_embeddings": 64, "rope_parameters": parameters}
    with pytest.raises(ModelError, match=named):
        hf_rope(Values(Path("config.json"), fields))


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match="rope kind is 'mrope'"):
        cos_sin_table(RopeConfig(kind="mrope"), 16, 8)
    with pytest.raises(ModelError, match="3 rope factors, but 8 frequencies"):
        cos_sin_table(RopeConfig(freq_factors=(1.0, 2.0, 3.0)), 16, 8)
