"""Tokens that the pass itself draws: the same text as when they are drawn after it, and what leaves is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish import LLM, SamplingParams
from pilotfish.engine.sampling.device_sampler import why_not_keyed
from pilotfish.engine.sampling.noise import as_int64, row_key, row_keys

GREEDY, DRAWN = SamplingParams(temperature=0.0, max_tokens=12), SamplingParams(temperature=0.9, seed=3, max_tokens=12)


SEEDS, POSITIONS = st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1 << 40)


@given(st.lists(st.tuples(SEEDS, POSITIONS), max_size=20), st.integers(0, 2))
def test_keys_of_many_rows(rows: list[tuple[int, int]], stream: int) -> None:
    positions = np.array([position for _, position in rows], dtype=np.int64)
    found = row_keys([seed for seed, _ in rows], positions, stream)
    assert np.array_equal(found, as_int64([row_key(*row, stream) for row in rows]))


def steps_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[list[list[int]], Counter[str]]:
    """Texts, and rows by where they were drawn."""
    where: Counter[str] = Counter()
    settle = llm.core.settle

    def counted(step):
        stats = settle(step)
        where.update(stats.drawn_rows)
        return stats

    llm.core.settle = counted  # type: ignore[method-assign]
    texts = [list(each.token_ids) for each in llm.generate(prompts, params)]
    llm.core.settle = settle  # type: ignore[method-assign]
    return texts, where


@pytest.fixture
def both(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LLM, LLM]]:
    """An engine whose passes draw, as on a GPU without captured ones, and one that draws after them."""

    def make(**settings: Any) -> tuple[LLM, LLM]:
        made = [LLM(str(tiny("llama")), kernels="torch", device="cpu", **settings) for _ in range(2)]
        monkeypatch.setattr(made[0].core.engine.runner, "_captured_draws", True)
        return made[0], made[1]

    return make


PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 9, 8, 9, 8], [30, 31, 32]]


@pytest.mark.parametrize("params", [[GREEDY] * 3, [DRAWN] * 3, [GREEDY, DRAWN, DRAWN]], ids=["greedy", "drawn", "both"])
def test_the_same_text(both, params: list[SamplingParams]) -> None:
    inside, outside = both(drafter=("ngram",), speculation="ngram")
    found, where = steps_of(inside, PROMPTS, params)
    assert set(where) == {"pass"}
    wanted, where = steps_of(outside, PROMPTS, params)
    assert set(where) == {"host"}
    assert found == wanted


def test_what_leaves_goes_through_the_verifier(both) -> None:
    special = {
        "logprobs": SamplingParams(temperature=0.0, logprobs=2, max_tokens=6),
        "penalties": SamplingParams(temperature=0.7, seed=1, presence_penalty=0.5, max_tokens=6),
        "truncation": SamplingParams(temperature=0.7, seed=1, top_p=0.5, max_tokens=6),
    }
    params = [*special.values(), DRAWN, GREEDY]
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[1]]
    inside, outside = both()
    found, where = steps_of(inside, prompts, params)
    assert set(where) == {"pass", *special}
    assert found == steps_of(outside, prompts, params)[0]
    for name, each in special.items():
        assert why_not_keyed(each, 512) == name


def test_prompt_logprobs_keep_all_outside(both) -> None:
    inside, outside = both()
    params = [SamplingParams(temperature=0.0, prompt_logprobs=1, max_tokens=2), DRAWN, DRAWN]
    found, where = steps_of(inside, PROMPTS, params)
    assert {"pass", "logprobs"} == set(where)
    assert found == steps_of(outside, PROMPTS, params)[0]


def test_rejection_draws_after_the_pass(both) -> None:
    inside, _ = both(verification="rejection")
    assert set(steps_of(inside, PROMPTS, [DRAWN] * 3)[1]) == {"host"}


def test_tokens_are_read_once(both, monkeypatch) -> None:
    """One wait for the device in a step: the tokens, and no logits."""
    inside, _ = both()
    core = inside.core
    for request in inside.requests(PROMPTS, [DRAWN] * 3):
        core.add(request)
    core.step()
    launched = core.launch()
    reads: list[torch.Tensor] = []
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        reads.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    core.finish(launched)
    assert len(reads) == 1
    assert launched.drawn is not None
    assert reads[0] is launched.drawn.tokens
