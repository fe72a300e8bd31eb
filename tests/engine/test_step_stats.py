"""What a step says of itself, against what the requests got."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.stats import StepStats, by_position

REPETITIVE = [5, 6, 7, 8] * 12


@pytest.fixture
def steps(tiny_llama: Path) -> Callable[..., tuple[list[StepStats], int]]:
    """Runs some requests; returns the stats of each step, and all generated tokens."""

    def run(**settings: Any) -> tuple[list[StepStats], int]:
        seen: list[StepStats] = []
        prompts = [REPETITIVE, [9, 8, 7] * 9, [40, 41, 42], REPETITIVE[:30]]
        defaults: dict[str, Any] = {"speculation": "ngram", "adaptive_drafts": False, "max_num_seqs": 3}
        with LLM(model=str(tiny_llama), kv_cache_memory=8 * 2**20, on_stats=seen.append, **defaults | settings) as llm:
            done = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
        return seen, sum(len(completion.token_ids) for completion in done)

    return run


def test_steps_add_up_to_what_was_generated(steps: Callable[..., tuple[list[StepStats], int]]) -> None:
    seen, tokens = steps()
    assert sum(step.generated_tokens for step in seen) == tokens == 240
    # The first token of each of the 4 answers comes with its prompt's end, not from decoding.
    assert sum(sum(map(sum, step.step_tokens.values())) for step in seen) == tokens - 4
    assert any(step.drafted for step in seen)
    for step in seen:
        assert step.sequences <= 3
        decoding = sum(map(len, step.step_tokens.values()))
        assert decoding <= step.sequences <= step.rows
        if decoding == step.sequences:
            assert step.rows == decoding + sum(step.drafted.values())
        assert {name: sum(counts) for name, counts in step.drafted_at.items()} == step.drafted
        accepted = {name: count for name, count in step.accepted.items() if count}
        assert {name: sum(counts) for name, counts in step.accepted_at.items()} == accepted
        for name, counts in step.step_tokens.items():
            assert all(1 <= count <= 9 for count in counts)
            assert name != "none" or set(counts) == {1}


def test_without_drafts_every_step_adds_one_token(steps: Callable[..., tuple[list[StepStats], int]]) -> None:
    seen, _ = steps(speculation="none")
    assert {name for step in seen for name in step.step_tokens} == {"none"}
    assert not any(step.drafted or step.drafted_at or step.accepted_at for step in seen)


def test_memory_is_told_now_and_then(tiny_llama: Path) -> None:
    seen: list[StepStats] = []
    with LLM(model=str(tiny_llama), kv_cache_memory=8 * 2**20, on_stats=seen.append) as llm:
        (loaded,) = llm.info.memory
        llm.generate([REPETITIVE], SamplingParams(max_tokens=30, ignore_eos=True))
    told = [memory for step in seen for memory in step.memory]
    assert 1 <= len(told) < len(seen)
    here = psutil.Process().memory_info().rss
    for memory in (loaded, told[0]):
        assert (memory.rank, memory.gpu) == (0, None)
        assert here / 2 < memory.resident < 2 * here


def test_positions_of_drafts_are_counted() -> None:
    assert by_position([("a", 3), ("b", 1), ("a", 1), ("", 0), ("c", 0)]) == {"a": (2, 1, 1), "b": (1,)}
