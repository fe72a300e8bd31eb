"""What drafts are worth (`goodput`): the tokens that a step is expected to bring, less where they are uneven."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.goodput import best_first, gains, worth

LONGEST = 8


def random_chances(seed: int, turns: int) -> np.ndarray:
    """(turns, LONGEST), as of drafts: each the product of probabilities."""
    return np.random.default_rng(seed).uniform(0.1, 1.0, (turns, LONGEST)).cumprod(axis=1)


@pytest.mark.parametrize("seed", range(10))
def test_of_one_sequence_the_tokens_count(seed: int) -> None:
    chances = random_chances(seed, 1)
    assert worth(1, best_first(chances[None])[0]) == pytest.approx(1 + chances[0].cumsum())


@pytest.mark.parametrize("seed", range(10))
def test_where_all_expect_the_same_the_sum_counts(seed: int) -> None:
    chances = np.repeat(random_chances(seed, 1), 6, axis=0)
    sums = worth(6, best_first(chances[None])[0])
    assert sums[5::6] == pytest.approx(6 * (1 + chances[0].cumsum()))


@pytest.mark.parametrize("seed", range(10))
def test_never_more_than_the_sum(seed: int) -> None:
    chances = random_chances(seed, 5)
    whole = worth(7, best_first(chances[None])[0])
    assert (np.diff(whole) > 0).all()
    assert 7 < whole[-1] < 7 + chances.sum()
    drafted = np.zeros(5 * LONGEST)
    order = np.argsort(-gains(chances).reshape(-1))
    for i, at in enumerate(order):
        drafted[at] = chances.reshape(-1)[at]
        assert whole[i] <= 7 + drafted.sum() + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_along_a_draft_tokens_gain_less_and_less(seed: int) -> None:
    """So the best tokens of all drafts are the beginnings of each."""
    assert (np.diff(gains(random_chances(seed, 5)), axis=1) < 0).all()


def test_even_drafts_are_worth_more_than_one_long_one() -> None:
    even, long = np.zeros((2, 4, LONGEST))
    even[:, 0] = 0.8
    long[0, :4] = 0.8
    assert worth(4, gains(even).sum()) > worth(4, gains(long).sum())
