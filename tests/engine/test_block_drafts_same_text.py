"""Promise 2 with a block drafter: the text of plain decoding, whoever shares the batch, the cache or the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish.engine.llm import LLM
from pilotfish.engine.speculation.drafters.block_drafter import BlockDrafter
from tests.support.heads import train_head
from tests.support.texts import PARAMS, prompts, stats_of, texts

Texts = list[tuple[list[int], str | None]]


@pytest.fixture(scope="module")
def block(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_head(tiny("llama"), tmp_path_factory.mktemp("block") / "block", "dflash")


@pytest.fixture(scope="module")
def make(tiny: Callable[[str], Path], block: Path, kernels: str) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "kernels": kernels,
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
            "adaptive_drafts": False,
            "num_draft_tokens": 5,
            "drafter": ("ngram", f"block={block}"),
            "speculation": "block",
        }
        return LLM(**{**defaults, **settings})

    return build


@pytest.fixture(scope="module")
def vanilla(make: Callable[..., LLM]) -> Callable[[str], Texts]:
    llm = make(speculation="none", prefix_caching=False)
    known: dict[str, Texts] = {}

    def text(name: str) -> Texts:
        if name not in known:
            known[name] = [texts(llm.generate([prompt], PARAMS[name]))[0] for prompt in prompts(8)]
        return known[name]

    return text


def drafter_of(llm: LLM) -> BlockDrafter:
    found = llm.core.engine.speculator.model_drafters["block"]
    assert isinstance(found, BlockDrafter)
    return found


def test_alone_in_a_batch_and_again(make: Callable[..., LLM], vanilla: Callable[[str], Texts]) -> None:
    """Greedy, sampled, with penalties, of a grammar: alone, together, and with the prompt in the prefix cache."""
    llm, accepted = make(), 0
    for name in ("greedy", "sampled", "penalties", "schema", "stops"):
        alone = [llm.generate([prompt], PARAMS[name])[0] for prompt in prompts(8)[:3]]
        together = llm.generate(prompts(8), PARAMS[name])
        assert texts(alone) == vanilla(name)[:3]
        assert texts(together) == vanilla(name)
        accepted += sum(stats_of(each).accepted_tokens for each in together if name == "greedy")
        assert any(stats_of(each).cached_prompt_tokens for each in together)
    assert accepted > 0
    assert drafter_of(llm)._pool.used == 0


def test_a_hit_in_the_prefix_cache_drafts_like_the_first_time(make: Callable[..., LLM]) -> None:
    """The same drafts are accepted: what it had read of the prompt is there."""
    llm = make()
    first = llm.generate([prompts(8)[7]], PARAMS["greedy"])[0]
    again = llm.generate([prompts(8)[7]], PARAMS["greedy"])[0]
    assert stats_of(again).cached_prompt_tokens > 0
    assert again.token_ids == first.token_ids
    counts = [(stats_of(each).drafted_tokens, stats_of(each).accepted_tokens) for each in (first, again)]
    assert counts[0] == counts[1]


def test_preempted_and_in_chunks(make: Callable[..., LLM], vanilla: Callable[[str], Texts]) -> None:
    # Keys and values of the target's two layers and of the drafter's one, 2 heads of 16 each.
    llm = make(kv_cache_memory=12 * 2 * 3 * 16 * 2 * 16 * 4, prefix_caching=False, max_batch_tokens=24, max_num_seqs=8)
    for name in ("greedy", "sampled"):
        got = llm.generate(prompts(8), PARAMS[name])
        assert texts(got) == vanilla(name)
        assert sum(stats_of(each).preemptions for each in got) > 0
    assert drafter_of(llm)._pool.used == 0


def test_the_controller_s_lengths_and_rejection(make: Callable[..., LLM], vanilla: Callable[[str], Texts]) -> None:
    adaptive = make(adaptive_drafts=True)
    for name in ("greedy", "sampled"):
        assert texts(adaptive.generate(prompts(8), PARAMS[name])) == vanilla(name)
    rejecting = make(verification="rejection")
    assert texts(rejecting.generate(prompts(8), PARAMS["greedy"])) == vanilla("greedy")
    assert texts(rejecting.generate(prompts(4), PARAMS["sampled"])) == texts(
        rejecting.generate(prompts(4), PARAMS["sampled"])
    )
