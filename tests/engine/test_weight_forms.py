"""Weights in fewer bits on the CPU: the same text with and without speculation, in each form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from pilotfish.engine.kernels.native import NativeBlocks
from pilotfish.engine.layers.decoder import Linears
from pilotfish.engine.llm import LLM
from pilotfish.engine.weights.blocks import QUANTIZED_TO, Blocks, Storage, in_blocks
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.errors import ConfigError
from tests.support.native import needs_native
from tests.support.parity import in_pieces, runner_of
from tests.support.ranks import RankedRunner
from tests.support.texts import PARAMS, SAMPLED, portfolio, prompts, stats_of, texts
from tests.support.tiny import build_model
from tests.support.tiny_gguf import write_gguf

pytestmark = needs_native

Tiny = Callable[[str], Path]
IDS = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333]
MIXED = ("off", "ngram", "eagle3", "draft-model", "suffix", "auto", "ngram", "draft-model")
SETTINGS = {name: {"quantization": name} for name in QUANTIZED_TO}
CLOSE = {"int8": 0.99, "int4": 0.9}
"""Least cosine similarity of the tiny models' logits, which are sharper than a real one's, with float32's."""


@pytest.fixture(scope="module", params=SETTINGS)
def make(request: pytest.FixtureRequest, tiny: Tiny) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "kernels": "native",
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
        }
        return LLM(**{**defaults, **SETTINGS[request.param], **settings})

    return build


def test_drafters_batches_and_prefix_hits(make: Callable[..., LLM], draft: Path, head: Path) -> None:
    vanilla = make(speculation="none", prefix_caching=False)
    speculative = make(drafter=portfolio(draft, head), adaptive_drafts=False, num_draft_tokens=5)
    accepted = 0
    for name in ("greedy", "sampled"):
        wanted = [texts(vanilla.generate([prompt], PARAMS[name]))[0] for prompt in prompts(8)]
        for _ in range(2):  # the second time prompts are in the prefix cache
            got = speculative.generate(prompts(8), PARAMS[name], speculation=MIXED)
            assert texts(got) == wanted
            accepted += sum(stats_of(completion).accepted_tokens for completion in got)
    assert accepted > 0
    params = msgspec.structs.replace(SAMPLED, logprobs=3)
    alone = [speculative.generate([prompt], params, speculation="off")[0] for prompt in prompts(8)]
    together = speculative.generate(prompts(8), params, speculation="ngram")
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]


@pytest.mark.parametrize("name", QUANTIZED_TO)
@pytest.mark.parametrize("kind", ["llama", "llama-biased", "qwen3", "gemma3", "phi3", "mixtral", "qwen2_moe"])
def test_logits_are_near_those_of_float32_and_the_same_in_any_pieces(tiny: Tiny, kind: str, name: str) -> None:
    path = str(tiny(kind))
    plain, runner = runner_of(path, "native"), runner_of(path, "native", quantization=name)
    found, wanted = (in_pieces(each, IDS, (7, 20)) for each in (runner, plain))
    assert torch.nn.functional.cosine_similarity(found, wanted).mean() > CLOSE[name]
    assert not torch.equal(found, wanted)
    for ends in ((20,), (1, 2, 3, 12, 20), tuple(range(1, 21))):
        assert torch.equal(in_pieces(runner, IDS, ends), found)
    layer: Any = runner.model.decoder.layers[0]
    for weight, to in ((layer.qkv, 0), (layer.output, 0), (runner.model.head, 1), (runner.model.embedding, 1)):
        assert isinstance(weight, NativeBlocks)
        assert {part.kind for part in weight.parts} == {QUANTIZED_TO[name][to]}


@pytest.mark.parametrize("form", ["BF16 folder", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3", "qwen2_moe"])
def test_16_bits_give_the_bits_of_float32(tmp_path: Path, kind: str, form: str) -> None:
    model = build_model(kind)
    if form == "BF16 folder":
        model.bfloat16().save_pretrained(tmp_path)
        path = tmp_path
    else:
        path = write_gguf(model, tmp_path / "model.gguf", Kind[form])
    kept, wide = runner_of(str(path), "native", dtype="auto"), runner_of(str(path), "native")
    for ends in ((20,), (1, 2, 3, 12, 20)):
        assert torch.equal(in_pieces(kept, IDS, ends), in_pieces(wide, IDS, ends))
    form = "float16" if form == "F16" else "bfloat16"
    assert kept.model.weight_forms[0] == form
    assert set(kept.model.weight_forms) <= {form, "float32"}
    assert wide.model.weight_forms == ("float32",)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_experts_of_a_gguf_file_stay_in_blocks(tmp_path: Path, kind: str) -> None:
    unsaid: dict[str, Any] = {"mlp_only_layers": []} if kind == "qwen3_moe" else {}
    path = str(write_gguf(build_model(kind, **unsaid), tmp_path / "model.gguf", Kind.Q8_0))
    kept, wide = runner_of(path, "native", dtype="auto"), runner_of(path, "native")
    assert kept.model.weight_forms[0] == "Q8_0"
    found = in_pieces(kept, IDS, (20,))
    assert torch.nn.functional.cosine_similarity(found, in_pieces(wide, IDS, (20,))).mean() > 0.99
    assert torch.equal(in_pieces(kept, IDS, (1, 2, 3, 12, 20)), found)
    for layer in kept.model.decoder.layers:
        mlp: Any = layer.mlp
        assert all(isinstance(each.gate_up, NativeBlocks) for each in mlp.experts)
        x = torch.randn(9, 64)
        linears = Linears(kept.model._kernels, kept.model.comm)
        assert mlp.native is not None
        assert torch.equal(mlp.forward(linears, x, None), replace(mlp, native=None).forward(linears, x, None))


@pytest.mark.parametrize(("inner", "cut"), [(192, 0), (160, 2)])
def test_ranks_keep_blocks_unless_their_parts_cut_them(
    tmp_path: Path, inner: int, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 160 inputs a rank has 80, two blocks and a half."""
    own = {"intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = str(write_gguf(build_model("llama-tied", **own), tmp_path / "model.gguf", Kind.Q8_0))
    whole = in_pieces(runner_of(path, "native", dtype="auto"), IDS, (7, 20))
    ranks = RankedRunner(path, 2, 8, kernels="native", dtype="auto")
    found = in_pieces(ranks, IDS, (7, 20))
    assert torch.nn.functional.cosine_similarity(found, whole).mean() > 0.99
    assert torch.equal(in_pieces(ranks, IDS, (1, 2, 3, 12, 20)), found)
    forms = {"Q8_0"} if not cut else {"Q8_0", "float32"}
    assert all(set(each.model.weight_forms) == forms for each in ranks.runners)
    assert (f"{cut} matrices become float32 on this rank, such as 'blk.0.ffn_down.weight'" in caplog.text) == bool(cut)


def test_rows_that_are_not_whole_blocks_and_routers_stay(caplog: pytest.LogCaptureFixture) -> None:
    declared = {
        "odd.weight": Tensor(
            name="odd.weight", shape=(8, 48), gguf="", axes=(None, None), linear="odd", quantizable=True
        ),
        "even.weight": Tensor(
            name="even.weight", shape=(8, 64), gguf="", axes=(None, None), linear="even", quantizable=True
        ),
        "gate.weight": Tensor(name="gate.weight", shape=(8, 64), gguf="", axes=(None, None), linear="gate"),
        "even.bias": Tensor(name="even.bias", shape=(8,), gguf="", axes=(None,), linear="even", quantizable=True),
    }
    weights = {name: torch.randn(tensor.shape) for name, tensor in declared.items()}

    def quantize(name: str, matrix: torch.Tensor, kind: Kind) -> Blocks:
        return Blocks(name, kind, torch.zeros(8, 40, dtype=torch.uint8))

    found = dict(in_blocks(weights.items(), declared, Storage(layers=Kind.Q4_1), None, quantize))
    assert [name for name, each in found.items() if isinstance(each, Blocks)] == ["even.weight"]
    assert all(found[name] is weights[name] for name in ("odd.weight", "gate.weight", "even.bias"))
    assert "1 matrices are not quantized, such as odd.weight" in caplog.text


@pytest.mark.parametrize("name", QUANTIZED_TO)
def test_other_kernels_refuse_it(tiny: Tiny, name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"quantization is '{name}', which the native kernels compute with, but kernels"
    ):
        runner_of(str(tiny("llama")), "torch", quantization=name)
    with pytest.raises(ConfigError, match=f"quantization is '{name}'.* not in torch.bfloat16 on cpu: leave it out"):
        runner_of(str(tiny("llama")), "torch", quantization=name, dtype="bfloat16")
