"""Rotary tables against transformers' own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import RopeConfig
from pilotfish.engine.models.rope import cos_sin_table, inverse_frequencies
from pilotfish.errors import ModelError
from tests.support.tiny import KINDS, build_model

Tiny = Callable[[str], Path]


def transformers_table(rotary: torch.nn.Module, positions: int, **layer: str) -> torch.Tensor:
    cosines, sines = rotary(torch.zeros(1), torch.arange(positions)[None], **layer)
    half = cosines.shape[-1] // 2
    return torch.cat((cosines[0, :, :half], sines[0, :, :half]), dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers(tiny: Tiny, kind: str) -> None:
    config = read_config(resolve(str(tiny(kind))))
    ours = cos_sin_table(config.rope, config.head_dim, config.max_position)
    assert ours.shape == (config.max_position, config.head_dim)
    assert ours.dtype == torch.float32
    rotary = build_model(kind).model.rotary_emb
    if config.local_rope is None:
        assert torch.equal(ours, transformers_table(rotary, config.max_position))
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


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match="rope kind is 'yarn'"):
        cos_sin_table(RopeConfig(kind="yarn"), 16, 8)
    with pytest.raises(ModelError, match="3 rope factors, but 8 frequencies"):
        cos_sin_table(RopeConfig(freq_factors=(1.0, 2.0, 3.0)), 16, 8)
