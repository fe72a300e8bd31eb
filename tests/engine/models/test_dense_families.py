"""The dense families beside Llama's and Gemma 3: what their files say, and the same text with any drafter, in any
batch, on any number of ranks. Their logits are compared with transformers' by the tests of all kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from pilotfish.checkpoints.catalog import resolve
from pilotfish.checkpoints.values import Values
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.layers.operator_decoder import OperatorDecoder
from pilotfish.engine.llm import LLM
from pilotfish.engine.models import granite, phi3, smollm3
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.registry import family_of
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError, ModelError
from tests.support.native import needs_native
from tests.support.parity import BLOCKS, OTHERS, KernelsName, in_pieces, logits_of, runner_of
from tests.support.ranks import RankedRunner
from tests.support.texts import stats_of
from tests.support.tiny import LONGROPE, UNFUSED, build_model, make_tiny
from tests.support.tiny_gguf import write_gguf

Tiny = Callable[[str], Path]

NEW = ("gemma2", "granite", "olmo2", "phi3", "smollm3")
PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.2, seed=7, max_tokens=24, ignore_eos=True)
PROMPTS = [(PROMPT[i : i + 7] * 4)[: 18 + 2 * i] for i in range(8)]


@pytest.mark.parametrize("kind", NEW)
def test_speculation_changes_no_text(tiny: Tiny, kernels: KernelsName, kind: str) -> None:
    """Greedy as transformers writes it; alone and in a batch of 8, by lookup and by the model itself."""
    llm = LLM(
        str(tiny(kind)),
        kernels=kernels,
        drafter=("ngram", str(tiny(kind))),
        speculation="none",
        kv_cache_memory=8 << 20,
        num_threads=1,
        adaptive_drafts=False,
    )
    greedy = [llm.generate([prompt], GREEDY, speculation="off")[0].token_ids for prompt in PROMPTS]
    # transformers would take longrope's short factors until a text is long, and compute its cache with both.
    ropes: dict[str, Any] = {}
    if kind == "phi3":
        ropes["rope_parameters"] = LONGROPE | {"short_factor": LONGROPE["long_factor"]}
    reference = build_model(kind, **ropes)
    wanted = list(PROMPTS[0])
    with torch.inference_mode():
        for _ in range(64):
            wanted.append(int(reference(torch.tensor([wanted])).logits[0, -1].argmax()))
    assert list(greedy[0]) == wanted[len(PROMPTS[0]) :]
    sampled = [llm.generate([prompt], SAMPLED, speculation="off")[0].token_ids for prompt in PROMPTS]
    for drafter in ("off", "ngram", kind):
        for params, texts in ((GREEDY, greedy), (SAMPLED, sampled)):
            found = llm.generate(PROMPTS, params, speculation=drafter)
            assert [completion.token_ids for completion in found] == texts
            if drafter == kind:
                assert all(stats_of(completion).accepted_tokens > 0 for completion in found)


@pytest.mark.parametrize("kind", NEW)
def test_two_ranks_write_the_same_text(tiny: Tiny, kernels: KernelsName, kind: str) -> None:
    def text(size: int) -> list[int]:
        runner = RankedRunner(str(tiny(kind)), size, len(BLOCKS) + len(OTHERS), kernels=kernels)
        tokens, start = PROMPT[:20], 0
        for _ in range(40):
            logits = runner.run([Span(tokens[start:], start, BLOCKS, 1)])
            start = len(tokens)
            tokens.append(int(logits.argmax()))
        return tokens

    assert text(2) == text(1)


@needs_native
@pytest.mark.parametrize("kind", [kind for kind in NEW if kind != "gemma2"])
def test_a_verified_row_has_the_bits_of_a_decoded_one(tiny: Tiny, kind: str) -> None:
    """All but Gemma 2's, whose capped scores are torch's."""
    runner = runner_of(str(tiny(kind)), "native")
    alone = torch.cat([runner.run([Span([token], i, BLOCKS, 1)]) for i, token in enumerate(PROMPT)])
    assert torch.equal(in_pieces(runner, PROMPT, (7, 8, 24, 29, 40)), alone)


@needs_native
@pytest.mark.parametrize("kind", NEW)
def test_which_decoder_they_have(tiny: Tiny, kind: str) -> None:
    """As the table of models says."""
    model = runner_of(str(tiny(kind)), "native").model
    assert type(model.decoder).__name__ == ("OperatorDecoder" if kind in UNFUSED else "FusedDecoder")
    assert (family_of(model.config.architecture).cpu == "fused") == (kind not in UNFUSED)


@pytest.mark.parametrize("kind", NEW)
def test_a_gguf_file_gives_transformers_logits(tmp_path: Path, kernels: KernelsName, kind: str) -> None:
    own = {"query_pre_attn_scalar": 32} if kind == "gemma2" else {}  # as files imply it
    path = write_gguf(build_model(kind, **own), tmp_path / "model.gguf")
    found = in_pieces(runner_of(str(path), kernels), PROMPT, (7, 8, 24, 40))
    torch.testing.assert_close(found, logits_of(build_model(kind, **own), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"sliding_window": 64}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"attention_multiplier": 0.25}),
        ("granite", {"logits_scaling": 1.0}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ],
)
def test_every_part_of_an_architecture_matters(kind: str, change: dict[str, Any]) -> None:
    """That the comparisons would notice."""
    assert (logits_of(build_model(kind, **change), PROMPT) - logits_of(build_model(kind), PROMPT)).abs().max() > 0.1


def test_mistral_smalls_text_part(tmp_path: Path, kernels: KernelsName) -> None:
    """The shape in text_config, other names of the tensors, and tensors of no use."""
    own: dict[str, Any] = {"sliding_window": None, "head_dim": 32}
    text = build_model("mistral", **own)
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = Mistral3Config(text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=False)
    both = Mistral3ForConditionalGeneration(config).eval()
    both.model.language_model.load_state_dict(text.model.state_dict())
    both.lm_head.load_state_dict(text.lm_head.state_dict())
    both.save_pretrained(tmp_path)
    found = in_pieces(runner_of(str(tmp_path), kernels), PROMPT, (7, 8, 24, 40))
    torch.testing.assert_close(found, logits_of(text, PROMPT), rtol=0, atol=1e-4)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["model_type"] = "ministral3"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"text_config\.model_type is 'ministral3'"):
        read_config(resolve(str(tmp_path)))


def test_published_configurations(tmp_path: Path) -> None:
    """What the families' own files leave out, or write in the form of transformers 4."""
    path = tmp_path / "config.json"
    shape = {"vocab_size": 64, "hidden_size": 3072, "intermediate_size": 64, "num_hidden_layers": 8}
    shape |= {"num_attention_heads": 24}
    rope = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    mini = {"model_type": "phi3", "rope_scaling": rope, "partial_rotary_factor": 0.75, "num_key_value_heads": 8}
    mini |= {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    config = phi3.read_hf(Values(path, shape | mini))
    assert (config.rope.kind, config.rope.share, config.rope.original_max_position) == ("longrope", 0.75, 4096)
    assert config.rope.attention_factor == pytest.approx(1.19, abs=0.001)
    assert phi3.read_hf(Values(path, shape | mini | {"rope_scaling": rope | {"type": "su"}})) == config
    assert phi3.read_hf(Values(path, shape | mini | {"rope_scaling": rope | {"type": "yarn"}})) == config
    config = smollm3.read_hf(Values(path, shape | {"model_type": "smollm3", "rope_scaling": None}))
    assert (config.unrotated_layers, config.rope.theta, config.tie_embeddings) == ((3, 7), 2000000.0, True)
    config = granite.read_hf(Values(path, shape | {"model_type": "granite", "attention_multiplier": 0.0078125}))
    assert (config.attention_scale, config.logit_divisor, config.num_kv_heads) == (0.0078125, 1.0, 24)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but the engine knows 'silu'"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but the engine knows 'silu'"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("granite", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("smollm3", {"rope_parameters": {"rope_type": "3d"}}, "rope_type is '3d', but the engine knows 'default'"),
    ],
)
def test_what_the_engine_does_not_know_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    folder = make_tiny(kind, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=named):
        read_config(resolve(str(folder)))


@needs_native
def test_capped_scores_go_to_torchs_attention(tiny: Tiny) -> None:
    folder = str(tiny("gemma2"))
    decoder = runner_of(folder, "native").model.decoder
    assert isinstance(decoder, OperatorDecoder)
    assert decoder._attention.name == "torch"
    with pytest.raises(ConfigError, match="attention_backend is 'native', but the model caps attention scores"):
        LLM(folder, attention_backend="native", device="cpu")


def test_a_stored_matrix_of_another_height_is_named(tmp_path: Path) -> None:
    folder = make_tiny("phi3", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    files = resolve(str(folder))
    with pytest.raises(ModelError, match=r"qkv_proj\.weight' has shape \(128, 64\), but .* \(192, 64\)"):
        list(iter_weights(files, read_config(files), torch.float32))
