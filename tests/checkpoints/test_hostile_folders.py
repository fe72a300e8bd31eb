"""Folders of tokenizers, drafts and adapters from anywhere: a ModelError that says what is wrong, never a crash."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.checkpoints.huggingface import head_kind, is_eagle3
from pilotfish.engine.models import dflash_checkpoint, eagle3_checkpoint, llama
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.lora import read_adapter
from pilotfish.errors import ModelError
from pilotfish.text.tokenizer import load_tokenizer
from tests.support import block_drafts
from tests.support import hostile_files as hostile

Tiny = Callable[[str], Path]


# Tokenizers


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.fixture
def tokenizer(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder with a good tokenizer, to be spoilt."""
    for path in tiny_llama.glob("*.json"):
        shutil.copy(path, tmp_path)
    for path in tiny_llama.glob("*.jinja"):
        shutil.copy(path, tmp_path)
    return tmp_path


def loaded(folder: Path) -> None:
    load_tokenizer(ModelFiles("m", "huggingface", folder))


def bpe(**fields: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | fields
    return {"version": "1.0", "added_tokens": [], "model": model}


@pytest.mark.parametrize(
    "content",
    [
        *("", "5", "[]", "{}", nested(10**5), '{"model": ' + nested(10**5) + "}"),
        bpe(vocab={"a": -1}),
        bpe(vocab={"a": 2**40}),
        bpe(vocab={"a": "x"}),
        bpe(merges=[["a", "zz"]]),
        bpe(merges=[5]),
        bpe(type="nothing"),
        bpe() | {"added_tokens": [{"id": 2**32 - 1, "content": "<x>", "special": True}]},
        bpe() | {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        bpe() | {"decoder": {"type": "nothing"}},
    ],
    ids=str,
)
def test_tokenizer_json(tokenizer: Path, content: str | dict[str, Any]) -> None:
    (tokenizer / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    start = time.thread_time()
    with pytest.raises(ModelError, match="tokenizer"):
        loaded(tokenizer)
    assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": "x" * (2**20 + 1)}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", []),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": [-1]}),
    ],
)
def test_files_beside_the_tokenizer(tokenizer: Path, name: str, content: Any) -> None:
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    (tokenizer / name).write_text(json.dumps(content))
    with pytest.raises(ModelError):
        loaded(tokenizer)


# Drafts


EAGLE3 = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 512,
    "draft_vocab_size": 100,
}


@pytest.mark.parametrize("name", [*EAGLE3, "eagle_config", "transformer_layer_config", "rope_scaling"])
def test_heads_configurations(tmp_path: Path, name: str) -> None:
    for odd in hostile.ODD:
        (tmp_path / "config.json").write_text(json.dumps(EAGLE3 | {name: odd}))
        try:
            if is_eagle3(tmp_path):
                eagle3_checkpoint.tensors_of(eagle3_checkpoint.read_config(tmp_path))
        except ModelError as error:
            said = str(error)
        else:
            continue
        assert str(tmp_path) in said


@pytest.mark.parametrize("offsets", [[10**6] * 100, [-5] * 100, [[0] * 100], [0.5] * 100])
def test_heads_whose_tokens_are_not_the_targets(tmp_path: Path, offsets: list[Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EAGLE3))
    config = eagle3_checkpoint.read_config(tmp_path)
    tensors = {
        name: torch.zeros(tensor.shape)
        for name, tensor in eagle3_checkpoint.tensors_of(config).items()
        if name != "embed_tokens.weight"
    }
    save_file(tensors | {"d2t": torch.tensor(offsets)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="d2t"):
        eagle3_checkpoint.read_weights(tmp_path, config, torch.float32)


BLOCK_FIELDS = ("use_swa", "sample_from_anchor", "draft_vocab_size", "target_hidden_size", "markov_head_type")


@pytest.mark.parametrize("config", [block_drafts.ZLAB, block_drafts.dspark(block_drafts.SPECULATORS, "rnn")])
def test_block_drafters_configurations(tmp_path: Path, config: dict[str, Any]) -> None:
    for name in (*config, *BLOCK_FIELDS):
        for odd in hostile.ODD:
            (tmp_path / "config.json").write_text(json.dumps(config | {name: odd}))
            try:
                if head_kind(tmp_path):
                    dflash_checkpoint.tensors_of(dflash_checkpoint.read_config(tmp_path))
            except ModelError as error:
                said = str(error)
            else:
                continue
            assert str(tmp_path) in said


# Adapters

PROJECTION = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def adapter(tiny: Tiny, folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | config))
    stored = {"A": torch.zeros(2, 64), "B": torch.zeros(64, 2)} | tensors
    save_file(
        {f"{PROJECTION}.lora_{name}.weight": each for name, each in stored.items()},
        folder / "adapter_model.safetensors",
    )
    shape = read_config(resolve(str(tiny("llama2"))))
    read_adapter(folder, tensors_of(shape), llama.FAMILY.declared_name)


def test_adapter_as_it_should_be(tiny: Tiny, tmp_path: Path) -> None:
    adapter(tiny, tmp_path, {"rank_pattern": {"layers.0.*q_proj": 2}})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"r": "x"}, "r is 'x'"),
        ({"r": 3}, "the rank 3"),
        ({"rank_pattern": 5}, "rank_pattern is 5"),
        ({"rank_pattern": {"(a+)+$": 2}}, "can take long"),
        ({"rank_pattern": {"(": 2}}, "not valid"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj is 'x'"),
        ({"alpha_pattern": {f"{i}": 1 for i in range(100)}}, "100 patterns"),
        ({"peft_type": []}, "peft_type is []"),
        ({"modules_to_save": "x"}, "modules_to_save is 'x'"),
    ],
)
def test_adapters_configurations(tiny: Tiny, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        adapter(tiny, tmp_path, config)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"A": torch.zeros(2)},
        {"A": torch.zeros(2, 64, 1)},
        {"A": torch.zeros(0, 64), "B": torch.zeros(64, 0)},
        {"B": torch.zeros(64)},
        {"B": torch.tensor(1.0)},
        {"A": torch.zeros(2, 63)},
        {"B": torch.zeros(65, 2)},
        {"C": torch.zeros(2, 64)},
    ],
    ids=lambda tensors: str({name: tuple(each.shape) for name, each in tensors.items()}),
)
def test_adapters_tensors(tiny: Tiny, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError):
        adapter(tiny, tmp_path, {}, **tensors)
