"""The published shapes against what is publicly known of the models, and how they are split over GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.layout import what_does_not_divide
from pilotfish.engine.models.registry import expected_shapes, tensors_of
from pilotfish.engine.weights.quantization import Quantization
from pilotfish.errors import ModelError
from pilotfish.tools.planner.models import PlannedModel, rank_shapes, read_shape
from pilotfish.tools.planner.published import PUBLISHED, find

KNOWN = {  # the number of parameters, rounded as on each model's page of the Hugging Face hub
    "llama-3.1-8b": ("8.03", 1e9),
    "llama-3.1-70b": ("70.6", 1e9),
    "llama-3.1-405b": ("405.9", 1e9),
    "llama-3.1-405b-fp8": ("405.9", 1e9),
    "llama-3.2-1b": ("1.24", 1e9),
    "llama-3.2-3b": ("3.21", 1e9),
    "smollm2-135m": ("134.5", 1e6),
    "gemma-3-270m": ("268.1", 1e6),
}


def planned(name: str) -> PlannedModel:
    shape = PUBLISHED[name]
    return PlannedModel(name=name, shape=shape, dtype="bfloat16", kv_dtype="bfloat16", quantization=shape.quantization)


def dtype_of(model: PlannedModel, name: str) -> str:
    return model.dtype_of(tensors_of(model.shape)[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_known_ones(name: str) -> None:
    known, unit = KNOWN[name]
    assert f"{planned(name).params / unit:.{len(known.partition('.')[2])}f}" == known


def test_sizes_worked_out_by_hand() -> None:
    seventy = planned("llama-3.1-70b")
    assert seventy.kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2 == 327_680
    assert seventy.weight_bytes() == 2 * 70_553_706_496
    # Embedding and head, 80 layers of q, k, v, o, three of the MLP and two norms, the last norm.
    layer = 8192 * (8192 + 1024 + 1024 + 8192 + 3 * 28672) + 2 * 8192
    assert seventy.params == 2 * 128256 * 8192 + 80 * layer + 8192
    assert (
        planned("llama-3.2-1b").params
        == 128256 * 2048 + 16 * (2048 * (2048 + 512 + 512 + 2048 + 3 * 8192) + 2 * 2048) + 2048
    )  # tied: no head


def test_metas_fp8_checkpoint_leaves_attention_and_the_ends_in_bfloat16() -> None:
    model = planned("llama-3.1-405b-fp8")
    mlp, attention = 3 * 16384 * 53248, 16384 * (2 * 16384 + 2 * 1024)
    scales = 124 * (2 * 53248 + 16384) * 4
    plain = 2 * 128256 * 16384 + 126 * attention + 2 * mlp + (2 * 126 + 1) * 16384
    assert model.weight_bytes() == 2 * plain + 124 * mlp + scales
    assert 480e9 < model.weight_bytes() < 490e9  # the checkpoint's known size, 486 GB
    assert {dtype_of(model, f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 125)} == {"bfloat16"}
    assert {dtype_of(model, f"model.layers.{i}.mlp.up_proj.weight") for i in (1, 10, 100, 124)} == {"fp8"}


def test_modules_that_stay_unquantized_may_be_named_by_a_pattern() -> None:
    model = replace(
        planned("llama-3.1-8b"), quantization=Quantization("fp8", ("lm_head", r"re:.*\.self_attn\.[qk]_proj"))
    )
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    assert [dtype_of(model, f"model.layers.3.{name}.weight") for name in names] == ["bfloat16", "fp8", "fp8"]
    assert dtype_of(model, "model.embed_tokens.weight") == "bfloat16"


def test_a_folder_counts_more_than_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Llama-3.1-8B-Instruct"
    folder.symlink_to(tiny_llama)
    assert read_shape(str(folder)).hidden_size == 64


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-405B-Instruct-FP8", "llama-3.1-405b-fp8"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("llama-3.2-1b", "llama-3.2-1b"),
    ],
)
def test_names_under_which_models_are_known(name: str, key: str) -> None:
    assert find(name) is PUBLISHED[key]


def test_a_model_that_is_not_published_here_is_read_from_its_folder_or_the_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_shape(str(tiny_llama)) == read_config(ModelFiles("tiny", "huggingface", tiny_llama))
    assert find("someone/llama-3.1-8b-finetuned") is None
    with pytest.raises(ModelError, match="is not in the Hugging Face cache"):
        read_shape("someone/no-such-model")
    hub = tmp_path / "hub"
    snapshot = hub / "models--someone--tuned" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "models--someone--tuned" / "refs").mkdir()
    (hub / "models--someone--tuned" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text((tiny_llama / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert read_shape("someone/tuned").hidden_size == json.loads((snapshot / "config.json").read_text())["hidden_size"]


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_published_shapes_are_those_of_the_catalogues_files(name: str) -> None:
    from pilotfish.checkpoints.catalog import resolve

    assert expected_shapes(read_config(resolve(name))) == expected_shapes(PUBLISHED[name])
    ours, theirs = PUBLISHED[name], read_config(resolve(name))
    for field in ("num_heads", "num_kv_heads", "head_dim", "max_position", "sliding_window", "tie_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field


@given(name=st.sampled_from(sorted(PUBLISHED)), ranks=st.integers(1, 16))
def test_a_split_model_has_every_weight_and_no_more(name: str, ranks: int) -> None:
    """Over all ranks each split tensor adds up to the whole; what is replicated is small or said so."""
    shape = PUBLISHED[name]
    if what_does_not_divide(shape, ranks):
        with pytest.raises(ValueError):
            rank_shapes(shape, ranks)
        return
    whole, parts = expected_shapes(shape), rank_shapes(shape, ranks)
    assert whole.keys() == parts.keys()
    for tensor, size in whole.items():
        if "norm" in tensor:
            assert parts[tensor] == size
        elif ".k_proj" in tensor or ".v_proj" in tensor:
            assert prod(parts[tensor]) * ranks == prod(size) * max(1, ranks // shape.num_kv_heads)
        else:
            assert prod(parts[tensor]) * ranks == prod(size)


def test_two_ranks_halve_the_weights_per_gpu() -> None:
    model = planned("llama-3.1-70b")
    for ranks in (1, 2, 4):
        halved, whole = model.weight_bytes(2 * ranks), model.weight_bytes(ranks)
        assert halved == pytest.approx(whole / 2, rel=1e-4)  # norms are everywhere
        assert model.kv_bytes_per_token(2 * ranks) == model.kv_bytes_per_token(ranks) / 2
    assert model.kv_bytes_per_token(16) == model.kv_bytes_per_token(8)  # 8 key-value heads: replicated from there on


def test_what_does_not_divide_is_said_with_its_size() -> None:
    shape = PUBLISHED["smollm2-135m"]
    assert what_does_not_divide(shape, 3) == []
    reasons = what_does_not_divide(shape, 2)
    assert any("num_heads (9)" in reason for reason in reasons)
    assert any("num_kv_heads (3)" in reason for reason in reasons)
    assert what_does_not_divide(PUBLISHED["gemma-3-270m"], 4) == []  # one key-value head: replicated


def test_a_sliding_window_limits_what_is_seen() -> None:
    gemma = planned("gemma-3-270m")  # 15 of 18 layers see 512 keys
    assert gemma.seen(100) == 100
    assert gemma.seen(10_000) == pytest.approx((15 * 512 + 3 * 10_000) / 18)
    assert planned("llama-3.1-8b").seen(10_000) == 10_000
