"""Models that transformers' own code computes: its logits on the engine's cache, the same text with any drafter, and
what is said of those that cannot be computed so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_target
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models import transformers_model
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError, ModelError
from tests.support.parity import BLOCKS, OTHERS
from tests.support.texts import stats_of
from tests.support.tiny import IM_END, IM_START, VOCAB_SIZE, make_tiny

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "cohere2": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "deepseek_v3": _MLA,
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_inner": 96},
    "starcoder2": {},
}
"""Layer norms and one norm for both halves; MLA, whose values are narrower than its keys, and shared experts; sinks;
learned positions; biases everywhere."""


def build(kind: str, **own: Any) -> Any:
    config = AutoConfig.for_model(kind, **(_SIZES | KINDS.get(kind, {}) | own))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.5 * parameter.shape[-1] ** -0.5 if "embed" not in name else 0.7))
            else:
                parameter.copy_((0.0 if name.endswith(("bias", "sinks")) else 1.0) + 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("models") / kind
            build(kind).save_pretrained(made[kind])
        return made[kind]

    return make


def runner_of(path: Path, **settings: Any) -> ModelRunner:
    config = EngineConfig(**{"model": str(path), "device": "cpu", "model_impl": "transformers"} | settings)
    model, platform, _ = load_target(config, lambda what, share: None)
    caches = kv_cache.allocate(model.config, platform.attention, 8, 16, platform.cache_dtype, platform.device)
    for cache in caches:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    return ModelRunner(model, caches, 16, platform.device)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(folder: Any, kind: str) -> None:
    """Prefill in chunks beside another sequence, decoding, and verification."""
    runner = runner_of(folder(kind))
    with torch.inference_mode():
        wanted = build(kind)(torch.tensor([PROMPT])).logits[0]
        other = build(kind)(torch.tensor([PROMPT[::-1]])).logits[0]
    assert wanted.std() > 0.3
    found = [
        runner.run([Span(PROMPT[:20], 0, BLOCKS, 20), Span(PROMPT[::-1][:9], 0, OTHERS, 9)]),
        runner.run([Span(PROMPT[::-1][9:10], 9, OTHERS, 1), Span(PROMPT[20:], 20, BLOCKS, 20)]),
    ]
    torch.testing.assert_close(found[0], torch.cat((wanted[:20], other[:9])), rtol=0, atol=2e-4)
    torch.testing.assert_close(found[1], torch.cat((other[9:10], wanted[20:])), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["cohere2", "deepseek_v3", "gpt_oss", "gpt2"])
def test_the_same_text(folder: Any, kind: str) -> None:
    """With and without speculation, alone and in a batch, greedy as transformers itself writes it, and sampled."""
    implementation: Any = "transformers" if kind == "gpt_oss" else "auto"
    llm = LLM(
        str(folder(kind)),
        model_impl=implementation,
        kv_cache_memory=8 << 20,
        num_threads=1,
        adaptive_drafts=False,
        drafter=("ngram",),
    )
    assert llm.info.kernels == "transformers+torch"
    prompts = [(PROMPT[i : i + 7] * 4)[: 18 + 2 * i] for i in range(8)]
    for params in (
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=5, max_tokens=16, ignore_eos=True),
    ):
        alone = [llm.generate([prompt], params, speculation="off")[0].token_ids for prompt in prompts]
        for drafter in ("off", "ngram"):
            found = llm.generate(prompts, params, speculation=drafter)
            assert [completion.token_ids for completion in found] == alone
        assert sum(stats_of(completion).drafted_tokens for completion in found) > 0
        if params.temperature == 0.0:
            reference, tokens = build(kind), list(prompts[0])
            with torch.inference_mode():
                for _ in range(24):
                    tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert list(alone[0]) == tokens[len(prompts[0]) :]


def test_a_family_of_the_engine_by_transformers_code(tmp_path: Path) -> None:
    """Which is asked for by name, and drafts for itself then."""
    path = make_tiny("gemma2", tmp_path / "model")
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    settings: dict[str, Any] = {"kv_cache_memory": 8 << 20, "num_threads": 1, "adaptive_drafts": False}
    wanted = LLM(str(path), **settings).generate([PROMPT], params)
    llm = LLM(str(path), model_impl="transformers", drafter=(f"own={path}",), speculation="own", **settings)
    found = llm.generate([PROMPT], params)
    assert found[0].token_ids == wanted[0].token_ids
    assert stats_of(found[0]).accepted_tokens > 0


def test_ropes_that_follow_a_texts_length_are_settled(tmp_path: Path) -> None:
    """As the engine's own code has them: by the longest text that is served, not by the batch."""
    path = make_tiny("phi3", tmp_path / "model")
    own, theirs = runner_of(path, model_impl="pilotfish"), runner_of(path)
    span = [Span(PROMPT[:20], 0, BLOCKS, 20)]  # the original context is 32
    torch.testing.assert_close(theirs.run(span), own.run(span), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "own", "named"),
    [
        ("mamba", {}, r"architecture 'mamba' cannot be served, .*attention interface; "),
        ("bloom", {}, r"'bloom' .*: its attention does not go through transformers' attention interface; "),
        ("qwen3_next", {}, r"'qwen3_next' .*; the nearest that can is 'qwen3"),
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
            r"'lfm2' .*layers of kind 'conv' keep another state than the paged cache",
        ),
        ("llama4_text", {}, r"'llama4_text' .*layers of kind 'chunked_attention' keep another state"),
        ("bert", {}, r"'bert' .*: its tokens see those after them"),
    ],
)
def test_what_cannot_be_computed_says_why_and_what_can(
    tmp_path: Path, kind: str, own: dict[str, Any], named: str
) -> None:
    AutoConfig.for_model(kind, **own).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=named):
        load_target(EngineConfig(model=str(tmp_path), load_format="dummy"), lambda what, share: None)


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen9"}))
    with pytest.raises(
        ModelError, match=r"'qwen9' .*transformers \(5.*does not have it; the nearest that can is 'qwen"
    ):
        load_target(EngineConfig(model=str(tmp_path), load_format="dummy"), lambda what, share: None)
    with pytest.raises(ModelError, match="model_type is 'qwen9', but the engine knows llama"):
        load_target(EngineConfig(model=str(tmp_path), model_impl="pilotfish"), lambda what, share: None)


def test_attention_that_needs_more_than_keys_and_values_is_noticed(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is tried before it is served."""
    original = transformers_model._attend

    def forgetful(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options | {"s_aux": None})

    monkeypatch.setattr(transformers_model, "_attend", forgetful)
    with pytest.raises(ModelError, match=r"'gpt_oss' .*with the engine's cache its logits are others \(by "):
        runner_of(folder("gpt_oss"))


def test_settings_that_do_not_go_with_it(folder: Any, head: Path, tmp_path: Path) -> None:
    path = str(folder("gpt2"))
    for settings, named in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, but transformers' code computes gpt2: use 1"),
        ({"quantization": "fp8"}, "quantization is 'fp8', but transformers' code"),
        ({"kernels": "native"}, "kernels is 'native', but transformers' code"),
    ):
        with pytest.raises(ConfigError, match=named):
            LLM(path, device="cpu", **settings)
    target = make_tiny("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match="reads the target's hidden states, which transformers' code does not give"):
        LLM(str(target), model_impl="transformers", drafter=(f"head={head}",), kv_cache_memory=8 << 20)


def test_the_installed_version_is_one_that_was_tried() -> None:
    assert int(transformers.__version__.partition(".")[0]) >= 5
