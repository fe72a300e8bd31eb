"""Mixtures of experts: transformers' logits, on one rank and on several, whichever way they are divided; the same bits
of a row whatever rows share its experts; the same text with any drafter; quantized experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import Linears
from pilotfish.engine.layers.experts import ExpertMlp
from pilotfish.engine.layers.native_experts import NativeExperts
from pilotfish.engine.llm import LLM
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.layout import Layout, what_does_not_divide
from pilotfish.engine.models.registry import active_parameters, parameter_count, tensors_of
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError, ModelError
from pilotfish.tools.planner.devices import find_device
from pilotfish.tools.planner.models import PlannedModel
from pilotfish.tools.planner.roofline import pass_seconds
from tests.support.native import BOTH, needs_native
from tests.support.pairwise import pairwise
from tests.support.parity import BLOCKS, OTHERS, KernelsName, in_pieces, logits_of, runner_of
from tests.support.ranks import RankedRunner
from tests.support.texts import stats_of
from tests.support.tiny import EXPERT_KINDS, build_model, make_tiny
from tests.support.tiny_gguf import write_gguf

Tiny = Callable[[str], Path]

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
WHOLE, CHUNKED, DECODED = (40,), (7, 8, 24, 25, 40), tuple(range(30, 41))


@pytest.mark.parametrize(
    ("kernels", "kind", "ends"), pairwise(BOTH, EXPERT_KINDS, (WHOLE, CHUNKED, DECODED)), indirect=["kernels"]
)
def test_logits_equal_transformers(tiny: Tiny, kernels: KernelsName, kind: str, ends: tuple[int, ...]) -> None:
    found = in_pieces(runner_of(str(tiny(kind)), kernels), PROMPT, ends)
    torch.testing.assert_close(found, logits_of(build_model(kind), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "kind", "expert_parallel"), pairwise(BOTH, EXPERT_KINDS, (False, True)), indirect=["kernels"]
)
def test_two_ranks_give_the_same_logits(tiny: Tiny, kernels: KernelsName, kind: str, expert_parallel: bool) -> None:
    runner = RankedRunner(str(tiny(kind)), 2, 8, kernels=kernels, expert_parallel=expert_parallel)
    found = in_pieces(runner, PROMPT, (7, 8, 24, 25, 26, 31, 40))
    torch.testing.assert_close(found, logits_of(build_model(kind), PROMPT), rtol=0, atol=1e-4)
    mlp = runner.model.decoder.layers[0].mlp
    assert isinstance(mlp, ExpertMlp)
    absent = [expert is None for expert in mlp.experts]
    assert absent == [expert_parallel and 2 * i >= len(absent) for i in range(len(absent))]


def test_ranks_that_do_not_divide_the_experts_evenly(tiny: Tiny) -> None:
    """Of 6 experts 4 ranks would have one or two."""
    with pytest.raises(ConfigError, match=r"experts\.count \(6\) does not divide by 4.*: use 1 or 2$"):
        RankedRunner(str(tiny("qwen2_moe")), 4, 8, kernels="torch", expert_parallel=True)
    config = read_config(resolve(str(tiny("qwen3_moe"))))
    assert any("experts.size (64)" in reason for reason in what_does_not_divide(config, 3))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_over_all_ranks_every_expert_is_there_once(tiny: Tiny, kind: str, expert_parallel: bool) -> None:
    config = replace(read_config(resolve(str(tiny(kind)))), expert_parallel=expert_parallel)
    parts = [Layout(config, rank, 2).parts() for rank in range(2)]
    for name, tensor in tensors_of(config).items():
        if tensor.expert is not None:
            sizes = [
                torch.Size([axis.stop - axis.start for axis in part[name]]).numel() for part in parts if name in part
            ]
            assert sum(sizes) == torch.Size(tensor.shape).numel()
            assert len(sizes) == (1 if expert_parallel or tensor.first_rank_only else 2)


@needs_native
@pytest.mark.parametrize(("kind", "size"), [("mixtral", 1), ("qwen2_moe", 1), ("qwen3_moe", 1), ("qwen3_moe", 2)])
def test_rows_that_share_experts_do_not_change_each_other(tiny: Tiny, kind: str, size: int) -> None:
    """Not a bit, however the sequences are cut and put together."""
    runner = RankedRunner(str(tiny(kind)), size, 8, kernels="native", expert_parallel=True)
    sequences = {"first": (PROMPT, BLOCKS), "second": (PROMPT[::-1], OTHERS)}
    alone = {
        name: torch.cat([runner.run([Span([token], i, blocks, 1)]) for i, token in enumerate(tokens)])
        for name, (tokens, blocks) in sequences.items()
    }

    @settings(max_examples=10)
    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=8, max_size=16))
    def check(cuts: list[tuple[int, int]]) -> None:
        at = dict.fromkeys(sequences, 0)
        for lengths in cuts:
            spans, wanted = [], []
            for (name, (tokens, blocks)), length in zip(sequences.items(), lengths, strict=True):
                start, stop = at[name], min(at[name] + length, len(tokens))
                if start < stop:
                    spans.append(Span(tokens[start:stop], start, blocks, stop - start))
                    wanted.append(alone[name][start:stop])
                    at[name] = stop
            if spans:
                assert torch.equal(runner.run(spans), torch.cat(wanted))

    check()


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_speculation_changes_no_text(tiny: Tiny, kernels: KernelsName, kind: str) -> None:
    """Greedy as transformers writes it; alone and in a batch of 8, by lookup and by the model itself."""
    llm = LLM(
        str(tiny(kind)),
        kernels=kernels,
        drafter=("ngram", str(tiny(kind))),
        kv_cache_memory=8 << 20,
        num_threads=1,
        adaptive_drafts=False,
    )
    prompts = [(PROMPT[i : i + 7] * 4)[: 18 + 2 * i] for i in range(8)]
    for params in (
        SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=7, max_tokens=16, ignore_eos=True),
    ):
        alone = [llm.generate([prompt], params, speculation="off")[0].token_ids for prompt in prompts]
        for drafter in ("off", "ngram", kind):
            found = llm.generate(prompts, params, speculation=drafter)
            assert [completion.token_ids for completion in found] == alone
            if drafter == kind:
                assert all(stats_of(completion).accepted_tokens > 0 for completion in found)
        if params.temperature == 0.0:
            reference, wanted = build_model(kind), list(prompts[0])
            with torch.inference_mode():
                for _ in range(64):
                    wanted.append(int(reference(torch.tensor([wanted])).logits[0, -1].argmax()))
            assert list(alone[0]) == wanted[len(prompts[0]) :]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_gguf_file_gives_transformers_logits(tmp_path: Path, kind: str) -> None:
    """Where the experts of a layer are one tensor; and 2 ranks read their parts of it."""
    # What files cannot say.
    unsaid: dict[str, dict[str, Any]] = {"qwen3_moe": {"mlp_only_layers": []}, "gpt_oss": {"swiglu_limit": 7.0}}
    own = unsaid.get(kind, {})
    path = write_gguf(build_model(kind, **own), tmp_path / "model.gguf")
    wanted = logits_of(build_model(kind, **own), PROMPT)
    torch.testing.assert_close(in_pieces(runner_of(str(path), "torch"), PROMPT, CHUNKED), wanted, rtol=0, atol=1e-4)
    for expert_parallel in (False, True):
        runner = RankedRunner(str(path), 2, 8, kernels="torch", expert_parallel=expert_parallel)
        torch.testing.assert_close(in_pieces(runner, PROMPT, CHUNKED), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in EXPERT_KINDS if kind != "gpt_oss"])
def test_a_folder_gives_the_experts_tensors(tiny: Tiny, kind: str) -> None:
    """transformers keeps a layer's experts in one tensor; published folders have a tensor of each."""
    files = resolve(str(tiny(kind)))
    config, theirs = read_config(files), dict(build_model(kind).named_parameters())
    assert config.experts is not None
    size = config.experts.size
    rows = {"gate_proj": slice(size), "w1": slice(size), "up_proj": slice(size, None), "w3": slice(size, None)}
    experts = [(name, tensor) for name, tensor in iter_weights(files, config, torch.float32) if ".experts." in name]
    assert len(experts) == 3 * config.experts.count * (config.num_layers - len(config.experts.dense_layers))
    for name, tensor in experts:
        layer, expert, which = name.split(".")[2], name.split(".")[5], name.split(".")[6]
        whole = "gate_up_proj" if which in rows else "down_proj"
        wanted = theirs[f"model.layers.{layer}.mlp.experts.{whole}"][int(expert)]
        assert torch.equal(tensor, wanted[rows.get(which, slice(None))])


def test_mxfp4_experts(tmp_path: Path, kernels: KernelsName) -> None:
    """A folder as it is published; on two ranks, divided either way. transformers' dequantizing is the reference."""
    model = build_model("gpt_oss", swiglu_limit=7.0)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    theirs = dict(model.named_parameters())
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            theirs[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    wanted = logits_of(model, PROMPT)
    torch.testing.assert_close(in_pieces(runner_of(str(tmp_path), kernels), PROMPT, CHUNKED), wanted, rtol=0, atol=2e-4)
    for expert_parallel in (False, True):
        runner = RankedRunner(str(tmp_path), 2, 8, kernels=kernels, expert_parallel=expert_parallel)
        torch.testing.assert_close(in_pieces(runner, PROMPT, CHUNKED), wanted, rtol=0, atol=2e-4)
    stored["model.layers.0.mlp.experts.down_proj_scales"] = torch.zeros(4, 64, 3, dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"down_proj_scales' has shape \(4, 64, 3\), but .* makes it \(experts, 64, 4\)"
    ):
        runner_of(str(tmp_path), kernels)


@pytest.mark.parametrize("change", [{"swiglu_limit": 0.5}, {"sliding_window": 64}])
def test_every_part_of_gpt_oss_matters(change: dict[str, Any]) -> None:
    assert (
        logits_of(build_model("gpt_oss", **change), PROMPT) - logits_of(build_model("gpt_oss"), PROMPT)
    ).abs().max() > 0.1


@pytest.mark.parametrize("quantization", ["fp8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_quantized_experts(tiny: Tiny, kind: str, quantization: str) -> None:
    plain, coarse = (
        in_pieces(runner_of(str(tiny(kind)), "torch", quantization=q), PROMPT, WHOLE) for q in ("none", quantization)
    )
    assert not torch.equal(plain, coarse)
    assert torch.nn.functional.cosine_similarity(plain, coarse).median() > 0.97


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, but the engine knows OLMoE with None"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2_moe", {"num_experts": 0}, "num_experts is 0, but must be a positive number"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
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


def test_random_weights_for_benchmarks(tiny: Tiny) -> None:
    runner = runner_of(str(tiny("qwen3_moe")), "torch", load_format="dummy")
    assert in_pieces(runner, PROMPT, WHOLE).isfinite().all()
    assert EngineConfig().expert_parallel is False


def test_a_tokens_parameters_are_its_experts(tiny: Tiny) -> None:
    config = read_config(resolve(str(tiny("qwen3_moe"))))
    assert config.experts is not None
    layers = config.num_layers - len(config.experts.dense_layers)
    idle = layers * (config.experts.count - config.experts.per_token) * 3 * config.experts.size * config.hidden_size
    assert active_parameters(config) == parameter_count(config) - idle


def test_the_planner_reads_the_experts_that_rows_take(tiny: Tiny) -> None:
    """Those of one row in a pass of one, nearly all in a pass of many, and no more than there are."""
    shape = read_config(resolve(str(tiny("qwen3_moe"))))
    assert shape.experts is not None
    wide = replace(shape, hidden_size=2048, experts=replace(shape.experts, size=4096, count=64, per_token=4))
    model = PlannedModel(name="wide", shape=wide, dtype="bfloat16", kv_dtype="bfloat16")
    device = find_device("h100")
    one, few, many = (pass_seconds(model, device, 1, rows, rows, 16, rows).weights for rows in (1, 4, 256))
    every = sum(matrix.bytes for matrix in model.matrices()) / (device.bandwidth * device.bandwidth_share)
    experts = sum(matrix.bytes for matrix in model.matrices() if matrix.share < 1)
    idle = experts * 60 / 64 / (device.bandwidth * device.bandwidth_share)
    assert one == pytest.approx(every - idle, rel=1e-6)
    assert 3 * one < few < 4 * one
    assert many == pytest.approx(every, rel=0.01)


def test_passes_that_are_timed_take_different_experts(tiny: Tiny) -> None:
    """Or a verification would look as cheap as its rows are alike."""
    runner = runner_of(str(tiny("qwen3_moe")), "torch")
    (span,) = runner.trial(12)
    assert len(set(span.token_ids)) == 12
    assert all(0 <= token < 512 for token in span.token_ids)


@needs_native
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_one_call_for_all_experts_gives_the_bits_of_one_by_one(tiny: Tiny, kind: str) -> None:
    """At any number of rows; the first rank of two has half of the experts, and adds nothing for the others."""
    runner = runner_of(str(tiny(kind)), "native")
    kernels = NativeKernels()
    before = kernels.threads
    kernels.set_threads(3)
    mlp = runner.model.decoder.layers[0].mlp
    assert isinstance(mlp, ExpertMlp)
    assert mlp.native is not None
    half = [expert if i % 2 else None for i, expert in enumerate(mlp.experts)]
    halved = NativeExperts.of([None if each is None else (each.gate_up, each.down) for each in half])
    sharded = replace(mlp, experts=half, native=halved)
    generator = torch.Generator().manual_seed(1)
    linears = Linears(kernels, ALONE)
    for rows in (1, 2, 7, 40):
        x = torch.randn(rows, runner.model.config.hidden_size, generator=generator)
        for each in (mlp, sharded):
            one_by_one = replace(each, native=None)
            assert torch.equal(each.forward(linears, x, None), one_by_one.forward(linears, x, None))
    kernels.set_threads(before)
