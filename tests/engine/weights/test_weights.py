"""Models as they lie on disk: every format gives the tensors of transformers' model, and bad files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.checkpoints.gguf_header import read_header
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.errors import ModelError
from tests.support.tiny import KINDS, build_model, declared, make_tiny
from tests.support.tiny_gguf import gguf_name, interleaved, write_gguf

Tiny = Callable[[str], Path]


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    files = resolve(str(path))
    pairs = list(iter_weights(files, read_config(files), dtype))
    weights = dict(pairs)
    assert len(weights) == len(pairs)
    assert all(tensor.dtype == dtype for tensor in weights.values())
    return weights


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=partial("{}: {}".format, name))


# Hugging Face folders


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface_folder_gives_the_models_tensors(tiny: Tiny, kind: str) -> None:
    assert_equal(load(tiny(kind)), declared(build_model(kind)))


def test_sharded_folder_equals_the_single_file(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_tiny("qwen2", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(load(folder), load(tiny("qwen2")))


def test_order_is_that_of_the_computation_and_dtype_is_converted(tiny: Tiny) -> None:
    files = resolve(str(tiny("llama")))
    names = [name for name, _ in iter_weights(files, read_config(files), torch.float32)]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    wanted = {name: tensor.bfloat16() for name, tensor in load(tiny("llama")).items()}
    assert_equal(load(tiny("llama"), torch.bfloat16), wanted)


def test_tied_head_and_old_rotary_buffers_may_be_there(tmp_path: Path) -> None:
    folder = make_tiny("llama-tied", tmp_path / "tied")
    wanted = load(folder)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(stored, folder / "model.safetensors")
    assert_equal(load(folder), wanted)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.norm.weight": None}, ["lacks", "model.norm.weight"]),
        ({"lm_head.weight": None}, ["lacks", "lm_head.weight"]),
        ({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}, ["has", "model.layers.1.self_attn.q_proj.bias"]),
        ({"model.norm.weight": torch.ones(65)}, ["model.norm.weight", "(65,)", "(64,)"]),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, ["model.norm.weight", "int8", "floating-point"]),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    folder = make_tiny("llama2", tmp_path / "wrong")
    stored: dict[str, Any] = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert all(part in str(caught.value) for part in named), caught.value


def test_damaged_or_absent_files_are_model_errors(tmp_path: Path) -> None:
    folder = make_tiny("llama2", tmp_path / "model", max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match=shard.name):
        load(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(folder)


# config.json


def edited(folder: Path, **changes: Any) -> Path:
    """A field with the value ... is taken out."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_version_4_configuration_reads_as_version_5(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    modern = read_config(resolve(str(folder)))
    assert (modern.rope.kind, modern.rope.factor, modern.rope.original_max_position) == ("llama3", 8.0, 64)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for key in ("rope_type", "type"):
        edited(
            folder,
            rope_parameters=...,
            rope_theta=10000.0,
            rope_scaling=scaling | {key: "llama3"},
            head_dim=...,
            dtype=...,
            torch_dtype="float32",
        )
        assert read_config(resolve(str(folder))) == modern


def test_sliding_window_follows_the_model_type(tiny: Tiny, tmp_path: Path) -> None:
    def window(folder: Path) -> int | None:
        return read_config(resolve(str(folder))).sliding_window

    assert window(tiny("mistral")) == 8
    assert window(tiny("llama")) is None
    assert window(edited(make_tiny("mistral", tmp_path / "null"), sliding_window=None)) is None
    qwen = make_tiny("qwen2", tmp_path / "qwen")
    assert window(edited(qwen, sliding_window=16, use_sliding_window=False, layer_types=...)) is None
    assert window(edited(qwen, sliding_window=16, use_sliding_window=True, max_window_layers=0)) == 16
    assert window(edited(qwen, sliding_window=16, use_sliding_window=True, max_window_layers=2)) is None
    with pytest.raises(ModelError, match="some layers have a sliding window"):
        window(edited(qwen, sliding_window=16, use_sliding_window=True, max_window_layers=1))


def test_end_of_text_ids_are_those_of_the_generation_config(tmp_path: Path) -> None:
    folder = make_tiny("llama2", tmp_path / "model")
    assert read_config(resolve(str(folder))).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_config(resolve(str(folder))).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks 'factor'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
    ],
)
def test_what_the_engine_does_not_know_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = edited(make_tiny("llama2", tmp_path / "model"), **changes)
    with pytest.raises(ModelError, match=named):
        read_config(resolve(str(folder)))


# GGUF


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_gives_the_models_tensors_and_shape(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model = build_model(kind)
    path = write_gguf(model, tmp_path / "model.gguf")
    assert_equal(load(path), declared(model))
    found, wanted = read_config(resolve(str(path))), read_config(resolve(str(tiny(kind))))
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(found, name) == getattr(wanted, name), name
    for name in ("head_dim", "max_position", "tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.rms_norm_eps == pytest.approx(wanted.rms_norm_eps)
    for name in ("attention_softcap", "logit_softcap", "unrotated_layers", "sliding_layers", "sandwich_norms"):
        if (kind, name) == ("gemma3", "sliding_layers"):  # every sixth is another, which four layers do not show
            continue
        assert getattr(found, name) == getattr(wanted, name), name
    for name in ("embedding_scale", "residual_scale", "logit_divisor"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name)), name
    assert found.rope.theta == wanted.rope.theta
    if kind in ("phi3", "smollm3"):  # llama3's scaling has another form there
        head_dim, longest = wanted.head_dim, wanted.max_position
        tables = (cos_sin_table(each.rope, head_dim, longest) for each in (found, wanted))
        torch.testing.assert_close(*tables, rtol=0, atol=1e-5)
    assert (found.eos_token_ids, found.bos_token_id, found.dtype) == ((2, 3), 1, "float32")


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_gguf_dequantizes_as_the_gguf_package_does(tmp_path: Path, kind: Kind) -> None:
    model = build_model("llama2")
    wanted = {}
    for name, tensor in declared(model).items():
        values = tensor.numpy()
        if values.ndim == 2:  # blocks lie in rows, so that rows may be permuted before or after
            values = gguf.dequantize(gguf.quantize(values, kind), kind)
        wanted[name] = torch.from_numpy(values)
    assert_equal(load(write_gguf(model, tmp_path / "model.gguf", kind)), wanted)


def test_gguf_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    path = write_gguf(build_model("llama2"), tmp_path / "model.gguf", Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert_equal(load(path), declared(theirs))


def test_gguf_header_agrees_with_the_gguf_packages_reader(tmp_path: Path) -> None:
    path = write_gguf(build_model("qwen3"), tmp_path / "model.gguf", Kind.Q4_1)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        place = ours.tensors[tensor.name]
        assert (place.offset, place.size, place.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert place.shape == tuple(tensor.shape.tolist()[::-1])
    values = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert len(values.pop("tokenizer.ggml.tokens")) == len(values.pop("tokenizer.ggml.token_type")) == 512
    assert ours.metadata == values


def test_gguf_rope_factors_become_part_of_the_configuration(tmp_path: Path) -> None:
    factors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    path = write_gguf(build_model("llama"), tmp_path / "model.gguf", rope_factors=factors)
    rope = read_config(resolve(str(path))).rope
    assert (rope.kind, rope.freq_factors) == ("default", tuple(factors))
    assert_equal(load(path), declared(build_model("llama")))


def test_gguf_linear_rope_scaling(tmp_path: Path) -> None:
    rope = read_config(resolve(str(write_gguf(build_model("llama-linear"), tmp_path / "model.gguf")))).rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"without": ("blk.1.ffn_up.weight",)}, ["lacks", "model.layers.1.mlp.up_proj.weight"]),
        ({"without": ("token_embd.weight",)}, ["lacks", "token_embd.weight"]),
        ({"replaced": {"blk.0.strange.weight": np.ones(4, np.float32)}}, ["has", "blk.0.strange.weight"]),
        ({"replaced": {"output_norm.weight": np.ones(65, np.float32)}}, ["output_norm.weight", "(65,)", "(64,)"]),
        ({"metadata": {"rope.scaling.type": "other"}}, ["rope.scaling.type", "'other'"]),
        ({"metadata": {"expert_count": 8}}, ["llama.expert_used_count is None"]),
    ],
)
def test_gguf_that_is_wrong_is_refused(tmp_path: Path, options: dict[str, Any], named: list[str]) -> None:
    path = write_gguf(build_model("llama2"), tmp_path / "model.gguf", **options)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in named), caught.value


def test_other_architectures_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture is 'mamba', but the engine knows llama"):
        load(path)
    whole = write_gguf(build_model("llama2"), path).read_bytes()
    for content in (b"", b"GGUF", b"not a model at all", whole[:5000], whole[:-100], whole[:4] + b"\x09" + whole[5:]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.gguf"):
            load(path)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (
            int(Kind.Q4_K),
            ["(128, 64)", "rows of blocks of 256, as Q4_K needs", "convert it to F16 or BF16"],
        ),
        (int(Kind.I32), ["is I32, which the engine cannot read", "one of F32, F16, BF16, Q4_0"]),
        (99, ["is of type 99"]),
    ],
)
def test_gguf_tensors_of_types_that_cannot_be_read_are_named(tmp_path: Path, kind: int, named: list[str]) -> None:
    path, name = write_gguf(build_model("llama2"), tmp_path / "model.gguf"), b"blk.1.ffn_up.weight"
    content = bytearray(path.read_bytes())
    place = content.index(name) + len(name) + 4 + 2 * 8  # after its number of dimensions, and these
    content[place : place + 4] = kind.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf") as caught:
        load(path)
    assert all(part in str(caught.value) for part in (*named, "'blk.1.ffn_up.weight'")), caught.value


def test_names_and_permutation_used_by_these_tests() -> None:
    assert gguf_name("model.layers.3.self_attn.q_proj.weight") == "blk.3.attn_q.weight"
    assert interleaved(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.real_model
def test_smollm2_reads_as_transformers_reads_it(smollm2: ModelFiles, smollm2_reference: PreTrainedModel) -> None:
    config = read_config(smollm2)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.rope.theta, config.tie_embeddings, config.eos_token_ids) == (100000.0, True, (2,))
    wanted = declared(smollm2_reference)
    for name, tensor in iter_weights(smollm2, config, torch.float32):
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_shape_and_tensors_are_known_without_torch(tiny: Tiny, tmp_path: Path, kind: str, form: str) -> None:
    """Frequency factors, which are a tensor, included."""
    path = tiny(kind)
    if form == "gguf":
        factors = [1.0] * (16 if kind == "gemma3" else 8)
        path = write_gguf(build_model(kind), tmp_path / "model.gguf", rope_factors=factors)
    program = (
        "import sys\n"
        "from pilotfish.engine.models.checkpoint import read_config\n"
        "from pilotfish.engine.models.layout import Layout\n"
        "from pilotfish.checkpoints.catalog import resolve\n"
        "Layout(read_config(resolve(sys.argv[1])), 1, 2).parts()\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == "False\n"
