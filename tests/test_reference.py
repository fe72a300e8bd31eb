"""The reference implementation in docs/speculation.md, run from the page: any drafter gives the same text, and the
engine draws the same tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish import LLM, SamplingParams
from pilotfish.engine.sampling.noise import log_exponential, row_key
from tests.support.paths import ROOT
from tests.support.tiny import VOCAB_SIZE, build_model

PAGE = (ROOT / "docs" / "speculation.md").read_text()
SOURCE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
REFERENCE: dict[str, Any] = {}
exec(compile(SOURCE, "docs/speculation.md", "exec"), REFERENCE)
generate: Callable[..., list[int]] = REFERENCE["generate"]

Drafter = Callable[[list[int], int], Sequence[int]]
PROMPT = [3, 1, 4, 1, 5]
SMALL_VOCAB = 11


def no_draft(tokens: list[int], k: int) -> list[int]:
    return []


class ToyTarget:
    """Logits that depend on a token and the two before it; counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, tokens: list[int]) -> np.ndarray:
        self.passes += 1
        contexts = [tuple(tokens[max(0, i - 2) : i + 1]) for i in range(len(tokens))]
        return np.stack([np.random.default_rng(context).normal(0.0, 2.0, SMALL_VOCAB) for context in contexts])


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5])
def test_a_perfect_drafter_saves_passes_and_changes_nothing(temperature: float) -> None:
    plain, drafted = ToyTarget(), ToyTarget()
    text = generate(plain, no_draft, PROMPT, 20, temperature=temperature, seed=7)
    answer = PROMPT + text

    def clairvoyant(tokens: list[int], k: int) -> list[int]:
        return answer[len(tokens) : len(tokens) + k]

    assert generate(drafted, clairvoyant, PROMPT, 20, temperature=temperature, seed=7, k=4) == text
    assert (plain.passes, drafted.passes) == (20, 4)  # five tokens a pass


@settings(max_examples=40, deadline=None)
@given(
    drafts=st.lists(st.lists(st.integers(0, SMALL_VOCAB - 1), max_size=6), min_size=1, max_size=8),
    k=st.integers(0, 6),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_any_draft_gives_the_same_text(drafts: list[list[int]], k: int, seed: int, temperature: float) -> None:
    """Drafts from anywhere, right only by accident, and of any length up to k."""

    def arbitrary(tokens: list[int], room: int) -> list[int]:
        return drafts[len(tokens) % len(drafts)][:room]

    options = {"temperature": temperature, "seed": seed}
    plain = generate(ToyTarget(), no_draft, PROMPT, 12, **options)
    assert generate(ToyTarget(), arbitrary, PROMPT, 12, k=k, **options) == plain


def test_another_seed_gives_another_text() -> None:
    texts = {tuple(generate(ToyTarget(), no_draft, PROMPT, 12, seed=seed)) for seed in range(8)}
    assert len(texts) == 8


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_engine_draws_the_same_tokens(tiny: Callable[[str], Path], temperature: float) -> None:
    """Transformers' model and the reference's loop, with the engine's noise, against the engine with its drafters."""
    model = build_model("llama")
    prompt = [40, 41, 42, 43, 40, 41, 42]

    @torch.inference_mode()
    def target(tokens: list[int]) -> np.ndarray:
        return model(torch.tensor([tokens])).logits[0].numpy()

    def noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
        return -log_exponential([row_key(seed, position)], torch.arange(vocab_size)[None])[0].numpy()

    def copycat(tokens: list[int], k: int) -> list[int]:
        return tokens[-4:][:k]

    options = {"temperature": temperature, "seed": 7, "noise": noise}
    expected = generate(target, copycat, prompt, 24, **options)
    assert generate(target, no_draft, prompt, 24, **options) == expected
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=24, ignore_eos=True)
    with LLM(str(tiny("llama")), kv_cache_memory=4 << 20, num_threads=1, adaptive_drafts=False) as llm:
        assert llm.info.vocab_size == VOCAB_SIZE
        for speculation in ("off", "ngram", "suffix"):
            (completion,) = llm.generate([prompt], params, speculation=speculation)
            assert completion.token_ids == expected, speculation


def test_the_noise_is_gumbel_noise_of_its_own_at_each_position() -> None:
    noise = np.stack([REFERENCE["gumbel"](seed, position, 500) for seed in (0, 1) for position in range(50)])
    assert len(np.unique(noise)) == noise.size
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.03)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.06)


def test_it_is_short_enough_to_read_at_once() -> None:
    assert len(SOURCE.splitlines()) <= 50
