"""DFlash drafters: the layouts they are published in, tensor by tensor, and their published architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.checkpoints.huggingface import is_dflash
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.block_runner import BlockRunner
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.models import dflash_checkpoint
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.dflash import DFlashModel
from pilotfish.engine.models.eagle3 import SharedWeights
from pilotfish.engine.weights import int8
from pilotfish.errors import ConfigError, ModelError
from tests.support import block_drafts as drafts
from tests.support.block_drafts import BLOCK, DEEPSPEC, DIM, HIDDEN, KV_HEADS, LAYERS, MASK, SPECULATORS, VOCAB, ZLAB

CPU = torch.device("cpu")
SIZE = 16
"""Tokens of a block of the KV cache."""

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], bool, int]] = {
    "z-lab": (ZLAB, {}, (1, 3, 5), False, BLOCK - 1),
    "DeepSpec": (DEEPSPEC, {"embedding": True, "head": True}, (0, 2, 4), True, BLOCK),
    "speculators": (SPECULATORS, {"draft_vocab": 32}, (1, 3, 5), False, BLOCK - 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_layout_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    config, given, layers, first_drafts, length = LAYOUTS[name]
    stored = drafts.random_tensors(**given)
    folder = drafts.write(tmp_path / "draft", config, stored)
    assert is_dflash(folder)
    with pytest.raises(ModelError, match="is a DFlash drafter"):
        read_hf_config(folder)
    shape = dflash_checkpoint.read_config(folder)
    read = dflash_checkpoint.read_weights(folder, shape, torch.float32)

    assert (shape.feature_layers, shape.first_drafts, shape.length) == (layers, first_drafts, length)
    assert (shape.block_size, shape.mask_token_id, shape.decoder.num_layers) == (BLOCK, MASK, LAYERS)
    assert (shape.decoder.num_heads, shape.decoder.num_kv_heads, shape.decoder.head_dim) == (4, KV_HEADS, DIM)
    assert shape.decoder.qk_norm
    expected = {name: tensor for name, tensor in stored.items() if name not in ("d2t", "t2d")}
    if "d2t" in stored:
        assert torch.equal(read.pop("target_ids"), stored["t2d"].nonzero().squeeze(1))
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_layers_that_a_configuration_does_not_name_are_spread() -> None:
    # As z-lab's build_target_layer_ids does.
    assert dflash_checkpoint._spread(36, 5) == [1, 9, 17, 25, 33]
    assert dflash_checkpoint._spread(28, 1) == [14]


def _changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {**config, **change, "dflash_config": {**ZLAB["dflash_config"], **change.get("dflash_config", {})}}


@pytest.mark.parametrize(
    ("change", "window", "slides", "causal"),
    [
        ({}, None, (False, False), ()),
        (
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7},
            7,
            (True, False),
            (True, False),
        ),
        ({"dflash_config": {"use_swa": True, "swa_window_size": 9}}, 9, (True, True), ()),
        ({"dflash_config": {"causal": True}}, None, (False, False), (True, True)),
    ],
)
def test_windows_and_order(
    change: dict[str, Any], window: int | None, slides: tuple[bool, ...], causal: tuple[bool, ...], tmp_path: Path
) -> None:
    drafts.write(tmp_path, _changed(ZLAB, change), drafts.random_tensors())
    shape = dflash_checkpoint.read_config(tmp_path)
    assert shape.decoder.sliding_window == window
    assert tuple(shape.decoder.slides(i) for i in range(LAYERS)) == slides
    assert shape.causal_layers == causal


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, tensors: tensors.pop("hidden_norm.weight"), "hidden_norm.weight"),
        (lambda config, tensors: tensors.update({"layers.0.extra.weight": torch.ones(1)}), "layers.0.extra.weight"),
        (lambda config, tensors: tensors.update({"fc.weight": torch.ones(HIDDEN, HIDDEN)}), "fc.weight"),
        (lambda config, tensors: config.update({"block_size": 1}), "block_size is 1"),
        (lambda config, tensors: config.update({"dflash_config": {"target_layer_ids": [1, 2, 3]}}), "mask_token_id is"),
        (lambda config, tensors: config.update({"draft_vocab_size": 32}), "d2t|lm_head"),
        (lambda config, tensors: config.update({"layer_types": ["sliding_attention"] * 2}), "sliding_window is None"),
        (lambda config, tensors: config.update({"layer_types": ["full_attention"]}), "layer_types has 1 entries"),
        (lambda config, tensors: config["dflash_config"].update({"target_layer_ids": ["a"]}), "target_layer_ids is"),
    ],
)
def test_what_cannot_be_read_is_named(change: Any, said: str, tmp_path: Path) -> None:
    config, tensors = json.loads(json.dumps(ZLAB)), drafts.random_tensors()
    change(config, tensors)
    folder = drafts.write(tmp_path, config, tensors)
    with pytest.raises(ModelError, match=said):
        dflash_checkpoint.read_weights(folder, dflash_checkpoint.read_config(folder), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"hidden_size": 32}, "hidden states of size 64"), ({"num_layers": 4}, r"layers \(1, 3, 5\)")],
)
def test_a_target_must_have_what_is_read(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    shape = dflash_checkpoint.read_config(drafts.write(tmp_path, ZLAB, drafts.random_tensors()))
    sizes = {"hidden_size": HIDDEN, "num_layers": 6} | change
    target = ModelConfig(
        architecture="llama",
        vocab_size=VOCAB,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
        **sizes,
    )
    with pytest.raises(ConfigError, match=f"drafter 'block' reads {said}"):
        dflash_checkpoint.check_target("block", shape, target)


def make_runner(kernels: str, folder: Path, embedding: torch.Tensor, head: torch.Tensor) -> BlockRunner:
    shape = dflash_checkpoint.read_config(folder)
    weights = dflash_checkpoint.read_weights(folder, shape, torch.float32)
    native = NativeKernels() if kernels == "native" else None
    chosen, attention = (native, NativeAttention(native)) if native else (TorchKernels(), TorchAttention())
    shared = SharedWeights(chosen.prepare_linear(embedding), chosen.prepare_linear(head))
    model = DFlashModel(shape, chosen, attention, weights, 256, CPU, torch.float32, shared)
    caches = [attention.allocate(12, SIZE, KV_HEADS, DIM, torch.float32, CPU) for _ in range(LAYERS)]
    return BlockRunner(model, caches, SIZE, CPU)


def block_spans(last: int, start: int, blocks: list[int]) -> list[Span]:
    tokens = [last] + [MASK] * (BLOCK - 1)
    return [Span([token], start + i, blocks, 1, sees=start + BLOCK) for i, token in enumerate(tokens)]


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}


@pytest.mark.parametrize(
    ("change", "windows", "causal"),
    [
        ({}, (None, None), (False, False)),
        (SLIDING, (7, None), (True, False)),
        ({"dflash_config": {"use_swa": True, "swa_window_size": 9}}, (9, 9), (False, False)),
        ({"attention_bias": False, "dflash_config": {"causal": True}}, (None, None), (True, True)),
    ],
)
def test_blocks_are_those_of_the_published_architecture(
    kernels: str, change: dict[str, Any], windows: Any, causal: Any, tmp_path: Path
) -> None:
    """Two sequences, whose features are read in pieces, draft a block side by side, and again after a few tokens more:
    what was written for the first block's rows is overwritten."""
    torch.manual_seed(0)
    tensors = drafts.random_tensors()
    embedding, head = torch.randn(VOCAB, HIDDEN) * 0.1, torch.randn(VOCAB, HIDDEN) * 0.1
    runner = make_runner(kernels, drafts.write(tmp_path, _changed(ZLAB, change), tensors), embedding, head)
    features = {name: torch.randn(40, 3 * HIDDEN) for name in "ab"}
    blocks = {"a": [5, 2, 7, 1, 9], "b": [3, 8, 0, 4, 6]}

    def read(name: str, start: int, stop: int) -> None:
        runner.read([Span([0] * (stop - start), start, blocks[name])], features[name][start:stop])

    read("a", 0, 20)
    read("b", 0, 3)
    runner.read(
        [Span([0] * 1, 20, blocks["a"]), Span([0] * 9, 3, blocks["b"])],
        torch.cat((features["a"][20:21], features["b"][3:12])),
    )
    for lengths, lasts in (((21, 12), (17, 40)), ((24, 13), (3, 9))):
        spans = [
            s for name, n, last in zip("ab", lengths, lasts, strict=True) for s in block_spans(last, n, blocks[name])
        ]
        hidden, logits = runner.run(spans)
        for i, (name, n, last) in enumerate(zip("ab", lengths, lasts, strict=True)):
            embedded = embedding[torch.tensor([last] + [MASK] * (BLOCK - 1))]
            wanted = drafts.block_hidden(tensors, features[name][:n], embedded, windows, causal)
            got = slice(i * BLOCK, (i + 1) * BLOCK)
            torch.testing.assert_close(hidden[got], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits[got], wanted @ head.T, rtol=1e-4, atol=1e-4)
        read("a", 21, 24)
        read("b", 12, 13)


def test_int8_matrices_draft_nearly_the_same(kernels: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = drafts.random_tensors(draft_vocab=32)
    quantized = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            quantized[name], quantized[f"{name}_scale"] = int8.quantize(tensor)
    embedding = torch.randn(VOCAB, HIDDEN) * 0.1
    features = torch.randn(11, 3 * HIDDEN)
    found = []
    for name, stored in (("plain", tensors), ("int8", quantized)):
        folder = drafts.write(tmp_path / name, SPECULATORS, stored)
        runner = make_runner(kernels, folder, embedding, embedding)
        runner.read([Span([0] * 11, 0, [0, 1])], features)
        found.append(runner.run(block_spans(3, 11, [0, 1]))[1])
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
    assert not torch.equal(found[0], found[1])
