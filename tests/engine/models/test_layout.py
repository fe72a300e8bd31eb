"""How a model is divided over ranks: each weight is on one of them, or where it must be, and parts fit together."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.layout import Layout, check_divides, num_kv_heads, what_does_not_divide
from pilotfish.engine.models.registry import expected_shapes
from pilotfish.engine.weights.tensors import shape_of
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.published import PUBLISHED


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 6))
    return ModelConfig(
        architecture=draw(st.sampled_from(["llama", "gemma3"])),
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 24)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 6)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        max_position=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sandwich_norms=draw(st.booleans()),
    )


def layouts(config: ModelConfig, size: int) -> list[Layout]:
    assume(not what_does_not_divide(config, size))
    return [Layout(config, rank, size) for rank in range(size)]


@given(config=configs(), size=st.integers(1, 8))
def test_over_all_ranks_every_weight_is_there_once_or_where_it_must_be(config: ModelConfig, size: int) -> None:
    ranks = layouts(config, size)
    for name, shape in expected_shapes(config).items():
        times = torch.zeros(shape, dtype=torch.int64)
        for layout in ranks:
            if (part := layout.parts().get(name)) is not None:
                times[part] += 1
        copies = 1
        if "norm" in name:
            copies = size
        elif ".k_proj" in name or ".v_proj" in name:
            copies = max(1, size // config.num_kv_heads)
        assert (times == copies).all(), name
    assert all(list(layout.parts()) == [n for n in expected_shapes(config) if n in layout.parts()] for layout in ranks)


@given(config=configs(), size=st.integers(1, 8))
def test_a_ranks_queries_read_the_key_value_heads_that_it_has(config: ModelConfig, size: int) -> None:
    group = config.num_heads // config.num_kv_heads
    for layout in layouts(config, size):
        queries, keys = (
            [row // config.head_dim for row in range(part[0].start, part[0].stop, config.head_dim)]
            for part in (layout.parts()[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
        )
        assert (len(queries), len(keys)) == (layout.num_heads, layout.num_kv_heads)
        assert len(queries) % len(keys) == 0
        for i, query in enumerate(queries):  # as attention groups them here: so many in a row for each key-value head
            assert keys[i // (len(queries) // len(keys))] == query // group
        assert num_kv_heads(config, size) == layout.num_kv_heads


@given(config=configs(), size=st.integers(1, 8))
def test_shapes_on_a_rank_fit_together(config: ModelConfig, size: int) -> None:
    for layout in layouts(config, size):
        shapes = {name: shape_of(part) for name, part in layout.parts().items()}
        queries = shapes["model.layers.0.self_attn.q_proj.weight"][0]
        assert shapes["model.layers.0.self_attn.o_proj.weight"] == (config.hidden_size, queries)
        inner = shapes["model.layers.0.mlp.up_proj.weight"][0]
        assert shapes["model.layers.0.mlp.down_proj.weight"] == (config.hidden_size, inner)
        assert inner == layout.intermediate_size == shapes["model.layers.0.mlp.gate_proj.weight"][0]
        assert shapes["model.embed_tokens.weight"][0] <= layout.vocab_part
        assert layout.vocab_part * size < config.vocab_size + size  # padding
        if layout.rank == 0:
            assert shapes["model.embed_tokens.weight"][0] == min(layout.vocab_part, config.vocab_size)


@given(config=configs())
def test_one_rank_has_everything(config: ModelConfig) -> None:
    assert {name: shape_of(part) for name, part in Layout(config).parts().items()} == expected_shapes(config)


@given(config=configs(), size=st.integers(2, 8), scheme=st.sampled_from([None, "fp8"]))
def test_a_refusal_names_the_setting_and_sizes_that_do_work(config: ModelConfig, size: int, scheme: str | None) -> None:
    if not what_does_not_divide(config, size, scheme):
        check_divides(config, size, scheme)
        return
    with pytest.raises(ConfigError, match=f"^some_size is {size}, but of toy .*: use 1.*$") as caught:
        check_divides(config, size, scheme, "some_size", "toy")
    remedy = str(caught.value).rpartition(": use ")[2]
    would = [int(n) for n in remedy.replace(" or ", ", ").split(", ")]
    assert size not in would
    for n in would:
        check_divides(config, n, scheme)
        Layout(config, n - 1, n)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_of_published_models_are_equal_over_ranks(name: str) -> None:
    """Weights of each rank, in parameters: the same but for padding, norms being everywhere."""
    config = PUBLISHED[name]
    for size in range(1, 17):
        if not what_does_not_divide(config, size):
            counts = {
                sum(prod(shape_of(part)) for part in Layout(config, r, size).parts().values()) for r in range(size)
            }
            assert len(counts) == 1


def test_the_last_part_of_a_vocabulary_is_shorter_or_empty() -> None:
    config = PUBLISHED["llama-3.1-8b"]  # 128256 tokens
    assert [Layout(config, rank, 16).vocabulary for rank in (0, 15)] == [slice(0, 8016), slice(120240, 128256)]
    odd = ModelConfig(
        architecture="llama",
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=8,
        num_kv_heads=8,
        head_dim=2,
        max_position=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=False,
    )
    assert [Layout(odd, rank, 4).vocabulary for rank in range(4)] == [
        slice(0, 3),
        slice(3, 6),
        slice(6, 9),
        slice(9, 10),
    ]
    assert [Layout(odd, rank, 8).vocabulary for rank in (4, 5, 7)] == [slice(8, 10), slice(10, 10), slice(10, 10)]
