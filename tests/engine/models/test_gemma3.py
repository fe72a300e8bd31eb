"""Gemma 3: its shape out of every kind of file, the same logits as transformers', and the same text with any drafter.

The tiny model goes through the tests of all kinds, too: test_model_parity and test_weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.checkpoints.gguf_header import read_header
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.registry import FAMILIES, family_of
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ModelError
from tests.support.parity import KernelsName, in_pieces, logits_of, runner_of
from tests.support.texts import stats_of
from tests.support.tiny import build_model, make_tiny
from tests.support.tiny_gguf import write_gguf

Tiny = Callable[[str], Path]

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
# As the files of the published models have it: every sixth layer sees everything, scores are scaled by a head's size.
PUBLISHED: dict[str, Any] = {
    "num_hidden_layers": 7,
    "layer_types": None,
    "query_pre_attn_scalar": 32,
    "rope_parameters": None,
}


def config_of(path: Path) -> ModelConfig:
    return read_config(resolve(str(path)))


# What the files say


def test_huggingface_configuration(tiny: Tiny) -> None:
    config = config_of(tiny("gemma3"))
    assert config.architecture == "gemma3"
    assert config.sliding_window == 8
    assert config.sliding_layers == (True, True, False, True)
    assert config.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert config.local_rope == RopeConfig(theta=1e4)
    assert config.attention_scale == 24**-0.5
    assert config.sandwich_norms
    assert config.qk_norm
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (1, 32, True)


def test_version_4_configuration_reads_as_version_5(tmp_path: Path) -> None:
    """As the published files are: no rope_parameters, and only what differs from the class's defaults."""
    folder = make_tiny("gemma3", tmp_path / "model", **PUBLISHED)
    modern = config_of(folder)
    assert modern.sliding_layers == (True,) * 5 + (False, True)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "bos_token_id", "tie_word_embeddings", "rms_norm_eps"):
        raw.pop(name, None)
    raw |= {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "final_logit_softcapping": None,
    }
    raw |= {"sliding_window_pattern": 6, "bos_token_id": 1, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(raw))
    assert config_of(folder) == modern
    raw |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}
    (folder / "config.json").write_text(json.dumps(raw))
    assert config_of(folder).rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert config_of(folder).local_rope == RopeConfig(theta=1e4)
    assert config_of(folder).sliding_layers == (True, False, True, False, True, False, True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* for 4 layers"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "must be 'sliding_attention' or"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_what_the_engine_does_not_know_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = make_tiny("gemma3", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=named):
        config_of(folder)


def test_the_text_part_of_a_model_that_sees(tiny: Tiny, tmp_path: Path) -> None:
    """Published 4B to 27B models: the shape in text_config, other names of the tensors, and tensors of no use."""
    text = build_model("gemma3")
    sight = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=sight.to_dict(), mm_tokens_per_image=4)
    both = Gemma3ForConditionalGeneration(config).eval()
    both.model.language_model.load_state_dict(text.model.state_dict())
    both.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in stored)
    alone, found = config_of(tiny("gemma3")), config_of(tmp_path)
    assert found == alone
    wanted = dict(text.state_dict())
    for name, tensor in iter_weights(resolve(str(tmp_path)), found, torch.float32):
        assert torch.equal(tensor, wanted[name]), name


def test_gguf_configuration(tmp_path: Path) -> None:
    path = write_gguf(build_model("gemma3", **PUBLISHED), tmp_path / "model.gguf")
    config = config_of(path)
    assert (config.architecture, config.sliding_window) == ("gemma3", 8)
    assert config.sliding_layers == (True,) * 5 + (False, True)
    assert (config.rope, config.local_rope) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert config.attention_scale is None
    assert config.qk_norm
    assert config.sandwich_norms
    scaled = config_of(write_gguf(build_model("gemma3"), tmp_path / "scaled.gguf"))
    assert (scaled.rope, scaled.local_rope) == (RopeConfig(theta=1e6, kind="linear", factor=8.0), RopeConfig(theta=1e4))
    pattern = {"attention.sliding_window_pattern": 2}
    every_second = config_of(write_gguf(build_model("gemma3"), tmp_path / "pattern.gguf", metadata=pattern))
    assert every_second.sliding_layers == (True, False, True, False)


def test_gguf_that_is_wrong_is_refused(tmp_path: Path) -> None:
    model = build_model("gemma3")
    path = write_gguf(model, tmp_path / "a.gguf", metadata={"final_logit_softcapping": 30})
    with pytest.raises(ModelError, match="final_logit_softcapping is 30"):
        config_of(path)
    path = write_gguf(model, tmp_path / "b.gguf", without=("blk.1.post_ffw_norm.weight",))
    with pytest.raises(ModelError, match=r"lacks tensor 'model\.layers\.1\.post_feedforward_layernorm\.weight'"):
        list(iter_weights(resolve(str(path)), config_of(path), torch.float32))


def test_every_architecture_that_can_be_read_can_be_computed() -> None:
    for family in FAMILIES:
        for name in (*family.model_types, *family.gguf_architectures):
            assert family_of(name) is family
    with pytest.raises(ModelError, match="'mamba', but the engine knows llama"):
        family_of("mamba")


# What comes out


def test_a_gguf_file_gives_transformers_logits(tmp_path: Path, kernels: KernelsName) -> None:
    """With the pattern and the frequencies that the file does not name."""
    model = build_model("gemma3", **PUBLISHED)
    path = write_gguf(model, tmp_path / "model.gguf")
    for ends in ((40,), (5, 17, 18, 40)):
        found = in_pieces(runner_of(str(path), kernels), PROMPT, ends)
        torch.testing.assert_close(found, logits_of(model, PROMPT), rtol=0, atol=1e-4)


def test_without_a_window(tmp_path: Path, kernels: KernelsName) -> None:
    """sliding_window_pattern 1 among the files that are out there: no layer slides, no local frequencies."""
    model = build_model("gemma3", layer_types=["full_attention"] * 4, query_pre_attn_scalar=32)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    found = in_pieces(runner_of(str(folder), kernels), PROMPT, (40,))
    torch.testing.assert_close(found, logits_of(model, PROMPT), rtol=0, atol=1e-4)


def test_every_part_of_the_architecture_matters(tiny: Tiny) -> None:
    """That the comparison above would notice: each of these is far off."""
    wanted = logits_of(build_model("gemma3"), PROMPT)
    for change in (
        {"sliding_window": 12},
        {"query_pre_attn_scalar": 32},
        {"layer_types": ["sliding_attention"] * 4},
        {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        },
    ):
        assert (logits_of(build_model("gemma3", **change), PROMPT) - wanted).abs().max() > 0.1


def test_bfloat16_is_transformers_bfloat16(tiny: Tiny) -> None:
    """The embedding's scale is rounded as transformers rounds it, the norms are not, and all in all the logits are no
    further from those in float32 than transformers' own."""
    config = EngineConfig(model=str(tiny("gemma3")), dtype="bfloat16", device="cpu", kernels="torch")
    model, platform, _ = load_model(config.model, None, config, 0, lambda what, share: None)
    caches = kv_cache.allocate(model.config, platform.attention, 8, 16, platform.dtype, platform.device)
    found = in_pieces(ModelRunner(model, caches, 16, platform.device), PROMPT, (40,))
    assert found.dtype == torch.bfloat16
    reference = build_model("gemma3").bfloat16()
    assert model.embedding_scale is not None
    embedded = platform.kernels.embed(torch.arange(512), model.embedding) * model.embedding_scale
    assert torch.equal(embedded, reference.model.embed_tokens(torch.arange(512)))
    for layer, theirs in zip(model.decoder.layers, reference.model.layers, strict=True):
        assert layer.mlp_post_norm is not None
        assert torch.equal(layer.mlp_post_norm, 1 + theirs.post_feedforward_layernorm.weight.float())
    exact = logits_of(build_model("gemma3"), PROMPT)
    wanted = logits_of(reference, PROMPT)
    assert (found - exact).square().mean() < 1.5 * (wanted - exact).square().mean()


# The same text


PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "sampled": SamplingParams(temperature=1.5, top_p=0.95, seed=7, max_tokens=40, ignore_eos=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS)
def test_speculation_does_not_change_the_text(tiny: Tiny, kernels: KernelsName, name: str) -> None:
    """Alone and in a batch, by lookup, by a draft of another family, by itself: which must be right always."""
    prompts = [(PROMPT[i : i + 9] * 4)[: 20 + 3 * i] for i in range(4)]

    def texts(llm: LLM, drafter: str) -> list[list[int]]:
        return [completion.token_ids for completion in llm.generate(prompts, PARAMS[name], speculation=drafter)]

    shared: dict[str, Any] = {"model": str(tiny("gemma3")), "kernels": kernels, "kv_cache_memory": 4 << 20}
    shared |= {"num_threads": 1, "adaptive_drafts": False}  # a target of this size is hardly worth drafting for
    other = LLM(**shared, drafter=("ngram", f"draft-model={tiny('llama')}"), num_draft_tokens=4)
    alone = [other.generate([prompt], PARAMS[name], speculation="off")[0].token_ids for prompt in prompts]
    assert len({token for text in alone for token in text}) > 8, "the same few tokens would agree with anything"
    for drafter in ("off", "ngram", "draft-model"):
        assert texts(other, drafter) == alone
    own = LLM(**shared, drafter=(f"draft-model={tiny('gemma3')}",), num_draft_tokens=4)
    completions = own.generate(prompts, PARAMS[name], speculation="draft-model")
    assert [completion.token_ids for completion in completions] == alone
    for completion in completions:
        stats = stats_of(completion)
        assert stats.accepted_tokens == stats.drafted_tokens > 0


# The real one


@pytest.fixture(scope="module")
def gemma() -> ModelFiles:
    return resolve("gemma-3-270m")


@pytest.fixture(scope="module")
def gemma_reference(gemma: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """As transformers itself reads and computes it, in float32; but out of a copy without the vocabulary, over which it
    would spend half a minute."""
    path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    header = read_header(gemma.path)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_vocab_size(header.tensors["token_embd.weight"].shape[0])
    for name, value in header.metadata.items():
        if name.startswith("gemma3."):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    data = np.memmap(gemma.path, dtype=np.uint8, mode="r")
    for name, place in header.tensors.items():
        raw = data[place.offset : place.offset + place.size]
        raw = raw.view(np.float32) if place.kind == Kind.F32 else raw.reshape(place.shape[0], -1)
        writer.add_tensor(name, raw, raw_dtype=place.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    finally:
        path.unlink()


@pytest.mark.real_model
def test_the_real_one_reads_as_transformers_reads_it(gemma: ModelFiles, gemma_reference: PreTrainedModel) -> None:
    config, theirs = read_config(gemma), gemma_reference.config
    assert [{True: "sliding_attention", False: "full_attention"}[slides] for slides in config.sliding_layers] == (
        theirs.layer_types
    )
    assert (config.sliding_window, config.max_position) == (theirs.sliding_window, theirs.max_position_embeddings)
    for rope, kind in ((config.rope, "full_attention"), (config.local_rope, "sliding_attention")):
        assert rope == RopeConfig(theta=theirs.rope_parameters[kind]["rope_theta"])
    assert (config.attention_scale or config.head_dim**-0.5) == theirs.query_pre_attn_scalar**-0.5
    assert (config.eos_token_ids, config.bos_token_id, config.vocab_size) == ((1,), 2, 262144)
    wanted = dict(gemma_reference.state_dict())
    del wanted["lm_head.weight"]
    for name, tensor in iter_weights(gemma, config, torch.float32):
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted


TEXT = [2, *(torch.randint(2000, 20000, (61,), generator=torch.Generator().manual_seed(0)).tolist() * 9)]
"""550 tokens, more than the window."""


COMPARED = (*range(10, 40), *range(520, 550))
"""The rows whose logits (262,144 each) are computed."""


@pytest.fixture(scope="module")
def some_logits(gemma_reference: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return gemma_reference(torch.tensor([TEXT]), logits_to_keep=torch.tensor(COMPARED)).logits[0]


@pytest.mark.real_model
def test_the_real_ones_logits_equal_transformers(
    gemma: ModelFiles, some_logits: torch.Tensor, kernels: KernelsName
) -> None:
    """torch's operators, which take long, on the beginning only."""
    blocks = np.random.default_rng(0).permutation(35).tolist()
    runner = runner_of(gemma.name, kernels, len(blocks))
    rows, start = [], 0
    for end in (10, 11, 20, 40, 256, 500, 520, 521, 530, 550)[: None if kernels == "native" else 4]:
        rows.append(runner.run([Span(TEXT[start:end], start, blocks, end - start if start in COMPARED else 0)]))
        start = end
    found = torch.cat(rows)
    torch.testing.assert_close(found, some_logits[: len(found)], rtol=0, atol=5e-4)
