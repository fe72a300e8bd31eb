"""Low-rank adapters: the logits of a model that has them merged into its weights; several in one batch, none of which
changes a bit of another; the same text with any drafter; prefixes apart; and what is no such adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.layers.fused_decoder import FusedDecoder
from pilotfish.engine.layers.lora import AdaptedDecoder
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError, ModelError, ParameterError
from tests.support.adapters import write_adapter
from tests.support.native import needs_native
from tests.support.parity import BLOCKS, OTHERS, DecoderRunner, KernelsName, logits_of, runner_of
from tests.support.ranks import RankedRunner
from tests.support.texts import stats_of
from tests.support.tiny import build_model

Tiny = Callable[[str], Path]

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2
KINDS = ("llama", "qwen3", "gemma3", "phi3", "olmo2", "qwen2_moe")
"""Among them one with stored matrices of several parts and heads that are rotated in part, and one with experts, of
which the attention and the shared one are adapted."""


def loaded(runner: DecoderRunner, folder: Path) -> int:
    assert runner.model.adapters is not None
    return runner.model.adapters.load(folder)


def in_pieces(runner: Any, adapter: int, ends: tuple[int, ...] = (7, 8, 24, 25, 40)) -> torch.Tensor:
    rows, start = [], 0
    for end in ends:
        rows.append(runner.run([Span(PROMPT[start:end], start, BLOCKS, end - start, adapter)]))
        start = end
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_merged_model(tiny: Tiny, tmp_path: Path, kernels: KernelsName, kind: str) -> None:
    runner = runner_of(str(tiny(kind)), kernels, lora_updates=True)
    merged = build_model(kind)
    number = loaded(runner, write_adapter(tmp_path / "a", merged, seed=1, rank=5, ranks={"v_proj": 3, "o_proj": 9}))
    wanted = logits_of(merged, PROMPT)
    assert (wanted - logits_of(build_model(kind), PROMPT)).abs().max() > 1
    torch.testing.assert_close(in_pieces(runner, number), wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(in_pieces(runner, 0), logits_of(build_model(kind), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
def test_two_ranks_have_their_parts_of_it(tiny: Tiny, tmp_path: Path, kernels: KernelsName, kind: str) -> None:
    merged = build_model(kind)
    folder = write_adapter(tmp_path / "a", merged, seed=1)
    runner = RankedRunner(str(tiny(kind)), 2, 8, kernels=kernels, lora_updates=True)
    assert {loaded(each, folder) for each in runner.runners} == {1}
    torch.testing.assert_close(in_pieces(runner, 1), logits_of(merged, PROMPT), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"targets": r".*\.q_proj"},
        {"targets": r".*\.(v|down)_proj", "rank": 1},
        {"use_rslora": True, "rank": 16},
        {"rank": 24, "alpha_pattern": {"k_proj": 3}},
    ],
)
def test_any_rank_scale_and_targets(tiny: Tiny, tmp_path: Path, config: dict[str, Any]) -> None:
    runner, merged = runner_of(str(tiny("llama")), "torch", lora_updates=True), build_model("llama")
    number = loaded(runner, write_adapter(tmp_path / "a", merged, seed=2, **config))
    torch.testing.assert_close(in_pieces(runner, number), logits_of(merged, PROMPT), rtol=0, atol=2e-4)


@needs_native
@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_rows_of_several_adapters_do_not_change_each_other(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """To the bit; and rows without one have those of an engine without any."""
    plain, runner = (runner_of(str(tiny(kind)), "native", lora_updates=each) for each in (False, True))
    for seed in (1, 2):
        loaded(runner, write_adapter(tmp_path / f"{seed}", build_model(kind), seed=seed))
    alone = {number: in_pieces(runner, number, tuple(range(1, 41))) for number in (0, 1, 2)}
    assert torch.equal(alone[0], in_pieces(plain, 0, tuple(range(1, 41))))
    assert not torch.equal(alone[1], alone[2])
    for first, second in ((0, 1), (1, 2), (2, 0), (1, 1)):
        runner.run([Span(PROMPT[:30], 0, BLOCKS, 0, first), Span(PROMPT[:9], 0, OTHERS, 0, second)])
        found = runner.run([Span(PROMPT[9:12], 9, OTHERS, 3, second), Span(PROMPT[30:], 30, BLOCKS, 10, first)])
        assert torch.equal(found, torch.cat((alone[second][9:12], alone[first][30:])))


def test_a_model_that_may_have_adapters_has_the_decoder_of_one_that_may_not(tiny: Tiny, kernels: KernelsName) -> None:
    """For passes without an adapter; the native kernels' computes those with adapters as well."""
    decoder = runner_of(str(tiny("llama")), kernels, lora_updates=True).model.decoder
    plain = decoder.plain if isinstance(decoder, AdaptedDecoder) else decoder
    assert isinstance(plain, FusedDecoder) == (kernels == "native")
    assert isinstance(decoder, AdaptedDecoder) == (kernels == "torch")
    assert not isinstance(runner_of(str(tiny("llama")), kernels).model.decoder, AdaptedDecoder)


def test_texts_are_each_adapters_own(tiny: Tiny, tmp_path: Path, kernels: KernelsName, draft: Path, head: Path) -> None:
    """Alone and in a batch of all, with any drafter, which is the base model's, and with prefixes cached."""
    merged = [build_model("llama") for _ in range(2)]
    folders = [write_adapter(tmp_path / f"{i}", model, seed=i) for i, model in enumerate(merged)]
    llm = LLM(
        str(tiny("llama")),
        kernels=kernels,
        lora=tuple(f"tuned-{i}={folder}" for i, folder in enumerate(folders)),
        drafter=("ngram", f"draft-model={draft}", f"eagle3={head}"),
        kv_cache_memory=8 << 20,
        num_threads=1,
        adaptive_drafts=False,
    )
    assert llm.info.adapters == ("tuned-0", "tuned-1")
    names = ["", "tuned-0", "tuned-1"] * 3
    prompts = [PROMPT[:37]] * 9  # the same for all: only the adapter tells them apart
    for params in (
        SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True),
    ):
        alone = [llm.generate(prompts[:1], params, speculation="off", adapter=name)[0].token_ids for name in names[:3]]
        assert len({tuple(ids) for ids in alone}) == 3
        if params.temperature == 0.0:
            for model, ids in zip([build_model("llama"), *merged], alone, strict=True):
                tokens = PROMPT[:37]
                with torch.inference_mode():
                    for _ in range(48):
                        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                assert tokens[37:] == list(ids)
        for drafter in ("off", "ngram", "draft-model", "eagle3"):
            found = llm.generate(prompts, params, speculation=drafter, adapter=names)
            assert [completion.token_ids for completion in found] == alone * 3
        assert sum(stats_of(completion).drafted_tokens for completion in found) > 0
    assert stats_of(found[8]).cached_prompt_tokens > 0
    with pytest.raises(ParameterError, match="the adapter 'tuned-2' is not loaded: there is 'tuned-0', 'tuned-1'"):
        llm.generate([PROMPT], adapter="tuned-2")


def test_adapters_come_and_go_while_requests_run(tiny: Tiny, tmp_path: Path) -> None:
    """A request keeps the adapter that it began with, and one of the same name finds none of its prefixes."""
    first, second = (write_adapter(tmp_path / f"{i}", build_model("llama"), seed=i) for i in (1, 2))
    settings: dict[str, Any] = {"kv_cache_memory": 8 << 20, "num_threads": 1, "adaptive_drafts": False}
    settings["suffix_memory"] = 0  # which would draft the whole answer at once, before anything can change
    llm = LLM(str(tiny("llama")), lora_updates=True, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

    def text(llm: LLM, adapter: str = "") -> list[int]:
        return list(llm.generate([PROMPT[:37]], params, adapter=adapter)[0].token_ids)

    wanted = [text(LLM(str(tiny("llama")), lora=(f"a={folder}",), **settings), "a") for folder in (first, second)]
    base = text(llm)
    llm.core.change_adapter("a", str(first))
    assert llm.info.adapters == ("a",)
    assert text(llm, "a") == wanted[0]
    with pytest.raises(ParameterError, match="an adapter 'a' is loaded already: unload it first"):
        llm.core.change_adapter("a", str(second))
    (request,) = llm.requests([PROMPT[:37]], params, adapter="a")
    tokens: list[int] = []
    for i, delta in enumerate(llm.stream([request])):
        tokens += delta.token_ids
        if i == 3:
            llm.core.change_adapter("a", None)
            llm.core.change_adapter("a", str(second))
    assert i > 3
    assert tokens == wanted[0]
    assert not llm.core._leaving
    assert text(llm, "a") == wanted[1]
    llm.core.change_adapter("a", None)
    assert text(llm) == base
    with pytest.raises(ParameterError, match="the adapter 'a' is not loaded: there is none"):
        text(llm, "a")
    with pytest.raises(ParameterError, match="no adapter 'a' is loaded"):
        llm.core.change_adapter("a", None)
    with pytest.raises(ParameterError, match="adapters cannot be changed: set lora_updates"):
        LLM(str(tiny("llama")), **settings).core.change_adapter("a", str(first))


def test_long_drafts_from_past_answers_leave_an_adapters_text(tiny: Tiny, tmp_path: Path) -> None:
    """The second time the memory has the whole answer, of the same adapter and of another."""
    folders = [write_adapter(tmp_path / f"{i}", build_model("llama"), seed=i) for i in (1, 2)]
    adapters = tuple(f"{name}={folder}" for name, folder in zip("ab", folders, strict=True))
    settings: dict[str, Any] = {
        "kv_cache_memory": 8 << 20,
        "num_threads": 1,
        "adaptive_drafts": False,
        "lora": adapters,
    }
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    def completions(llm: LLM, **speculation: Any) -> list[Any]:
        names = ["a", "b", "", "a", "b", ""]
        return [llm.generate([PROMPT[:37]], params, adapter=name, **speculation)[0] for name in names]

    plain = completions(LLM(str(tiny("llama")), **settings), speculation="off")
    drafted = completions(LLM(str(tiny("llama")), **settings), speculation="suffix-memory")
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    assert all(each.stats.steps < 12 for each in drafted[3:])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but the engine knows 'LORA'"),
        ({"use_dora": True}, "use_dora is True, but the engine knows adapters with False only"),
        ({"bias": "all"}, "bias is 'all', but the engine knows adapters with 'none' only"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"r": 8}, "the rank 8, but its matrices have 4"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tiny: Tiny, tmp_path: Path, config: dict[str, Any], named: str) -> None:
    folder = write_adapter(tmp_path / "a", build_model("llama"), seed=1)
    fields = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=named):
        loaded(runner_of(str(tiny("llama")), "torch", lora_updates=True), folder)


def test_what_is_no_adapter_of_this_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    runner = runner_of(str(tiny("llama")), "torch", lora_updates=True)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json: an adapter is a folder that PEFT has written"):
        loaded(runner, tmp_path)
    other = write_adapter(tmp_path / "other", build_model("qwen3"), seed=1)
    with pytest.raises(ModelError, match=r"the adapter's matrices for 'model\.layers\.0\.[a-z_.]*' are"):
        loaded(runner, other)
    folder = write_adapter(tmp_path / "a", build_model("llama"), seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    head, sizes = "base_model.model.lm_head.lora_", {"A": (4, 64), "B": (512, 4)}
    for changed, named in (
        ({f"{head}A.weight": torch.zeros(4, 64)}, "an A without its B, but the engine knows pairs"),
        (
            {f"{head}{letter}.weight": torch.zeros(size) for letter, size in sizes.items()},
            "changes 'lm_head', but the engine adapts layers' dense matrices",
        ),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}, "lora_embedding_A"),
    ):
        save_file(tensors | changed, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=named):
            loaded(runner, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*adapter_model\.safetensors"):
        loaded(runner, folder)


def test_settings_that_are_wrong(tiny: Tiny) -> None:
    for lora, named in (
        (("folder",), "lora is 'folder', but must be NAME=FOLDER"),
        (("a=x", "a=y"), "lora has 'a' twice"),
    ):
        with pytest.raises(ConfigError, match=named):
            EngineConfig(lora=lora).check()
    with pytest.raises(ConfigError, match="lora adapts the engine's own families"):
        LLM(str(tiny("llama")), model_impl="transformers", lora=("a=/nowhere",))
