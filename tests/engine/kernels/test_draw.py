"""Drawing tokens by the native kernels, against the definition by torch's operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.kernels.draw import can_draw, draw
from pilotfish.engine.kernels.native import load_library
from pilotfish.engine.sampling.noise import log_exponential, row_key

library = load_library()
pytestmark = pytest.mark.skipif(library is None, reason="the native kernels were not built")
LEVELS = range(1 + int(library.pilotfish_level())) if library is not None else ()
VOCAB = st.sampled_from([1, 3, 16, 100, 4095, 4096, 4097, 10007])


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25)
@given(
    vocab=VOCAB,
    temperatures=st.lists(st.sampled_from([0.0, 0.01, 0.8, 1.0, 2.0]), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 3.0, 100.0]),
    banned=st.integers(0, 3),
)
def test_draws_the_winner_of_the_race(level, vocab, temperatures, seed, spread, banned):
    rows, generator = len(temperatures), torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits[:, : min(banned, vocab - 1)] = -float("inf")
    keys = [row_key(seed, position) for position in range(rows)]
    noise = log_exponential(keys, torch.arange(vocab, dtype=torch.int32).unsqueeze(0))
    found = draw(logits, range(rows), keys, temperatures, level)
    for row, (token, temperature) in enumerate(zip(found, temperatures, strict=True)):
        scaled = logits[row] - logits[row].max()
        if temperature == 0.0:
            assert token == scaled.argmax()
            continue
        scores = scaled.double() / temperature - noise[row].double()
        # Within rounding: torch's noise is another function of the same words.
        assert scores[token] >= scores.max() - 1e-5 * (1 + scores.max().abs())
        assert scores[token] > -float("inf")


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), vocab=VOCAB, rows=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
def test_a_row_draws_alone_what_it_draws_among_others(level, seed, vocab, rows):
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(seed))
    keys = [row_key(seed, row) for row in rows]
    alone = [draw(logits[row : row + 1], [0], [key], [1.0], level)[0] for row, key in zip(rows, keys, strict=True)]
    assert draw(logits, rows, keys, [1.0] * len(rows), level) == alone


def test_nothing_that_may_be_drawn_is_token_0():
    logits = torch.full((2, 5000), -float("inf"))
    assert draw(logits, range(2), [1, 2], [0.0, 1.0]) == [0, 0]


def test_takes_what_lies_as_it_reads_it():
    assert can_draw(torch.zeros(2, 8))
    assert not can_draw(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not can_draw(torch.zeros(8, 2).T)
