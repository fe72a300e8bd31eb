"""The memory across requests in an engine: no text changes by it, and no tenant notices another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotfish.engine.llm import LLM
from pilotfish.engine.request import Request, RequestStats
from pilotfish.engine.stats import StepStats
from tests.support.texts import PARAMS, prompts, texts

MEMORY = "suffix-memory"


@pytest.fixture(scope="module")
def make(tiny: Callable[[str], Path]) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        fixed: dict[str, Any] = {
            "drafter": ("ngram", MEMORY),
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
            "suffix_memory": 1 << 20,
        }
        return LLM(str(tiny("llama")), **(fixed | settings))

    return build


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("batch", [1, 8])
def test_no_text_changes(make: Callable[..., LLM], adaptive: bool, batch: int) -> None:
    """Each answer is asked for again and again, so that it is drafted from the ones before."""
    drafted = 0
    with make(adaptive_drafts=adaptive) as llm:
        for name in ("greedy", "sampled", "penalties", "stops"):
            wanted = texts(llm.generate(prompts(8), PARAMS[name], speculation="off"))
            for speculation in (MEMORY, MEMORY, "auto"):
                got = []
                for start in range(0, 8, batch):
                    chosen = prompts(8)[start : start + batch]
                    got += llm.generate(chosen, PARAMS[name], speculation=speculation)
                assert texts(got) == wanted
                drafted += sum(each.stats.accepted_tokens for each in got if each.stats is not None)
    assert drafted > 0


def outcomes(llm: LLM, requests: Sequence[Request]) -> list[tuple[object, ...]]:
    """What a client can see of each request in turn: tokens, drafts, and how many of them were accepted."""
    seen: list[tuple[object, ...]] = []
    for request in requests:
        stats: RequestStats | None = None
        for delta in llm.stream([request]):
            seen.append((delta.token_ids, delta.drafter, delta.drafted, delta.accepted, delta.rejected))
            stats = delta.stats
        assert stats is not None
        seen.append((stats.drafter, stats.drafted_tokens, stats.accepted_tokens, stats.steps))
    return seen


@pytest.mark.parametrize(("tenant", "salt"), [("b", b""), ("a", b"x"), ("", b"")])
def test_a_tenant_sees_nothing_of_another(make: Callable[..., LLM], tenant: str, salt: bytes) -> None:
    """The very same requests, alone and after another tenant's or salt's: nothing of what a client sees differs."""

    def asked(llm: LLM, who: str, with_salt: bytes) -> list[Request]:
        made = llm.requests(prompts(3), PARAMS["greedy"], speculation=MEMORY)
        return [msgspec.structs.replace(each, tenant=who, salt=with_salt) for each in made]

    with make(adaptive_drafts=False) as llm:
        alone = outcomes(llm, asked(llm, "a", b"") * 1)
        again = outcomes(llm, asked(llm, "a", b""))
        assert again != alone  # its own past it does see
    with make(adaptive_drafts=False) as llm:
        outcomes(llm, asked(llm, tenant, salt))
        assert outcomes(llm, asked(llm, "a", b"")) == alone
        assert outcomes(llm, asked(llm, "a", b"")) == again


def test_its_uses_are_in_the_stats_of_steps(make: Callable[..., LLM]) -> None:
    seen: list[StepStats] = []
    with make(adaptive_drafts=False, on_stats=seen.append) as llm:
        for _ in range(2):
            llm.generate(prompts(2), PARAMS["greedy"], speculation=MEMORY)
        llm.generate(prompts(2), PARAMS["greedy"], speculation="off")
    assert [each.past_bytes for each in seen] == sorted(each.past_bytes for each in seen)
    assert seen[-1].past_bytes > 0
    assert 0 < sum(each.past_hits for each in seen) <= sum(each.past_queries for each in seen)
    assert (seen[-1].past_queries, seen[-1].past_hits) == (0, 0)


def test_without_memory_there_is_no_such_drafter(make: Callable[..., LLM]) -> None:
    with make(drafter=(), suffix_memory=0) as llm:
        assert MEMORY not in llm.info.drafters
    with make(drafter=()) as llm:
        assert MEMORY in llm.info.drafters
