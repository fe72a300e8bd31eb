"""What drafts are worth (`goodput`): the tokens that a step is expected to bring, less where they are uneven."""

from __future__ import annotations

import math
import random
from itertools import accumulate, pairwise

import pytest

from pilotfish.engine.speculation.control.goodput import gains, goodputs, worth

LONGEST = 8


def random_chances(seed: int, candidates: int) -> list[list[float]]:
    """As of drafts: each the product of probabilities."""
    source = random.Random(seed)
    return [
        list(accumulate((source.uniform(0.1, 1.0) for _ in range(LONGEST)), lambda alive, each: alive * each))
        for _ in range(candidates)
    ]


def worths(decoding: int, chances: list[list[float]]) -> list[float]:
    """With 1, 2, ... tokens, the best first."""
    best = sorted((each for draft in chances for each in gains(decoding, draft)), reverse=True)
    return [worth(decoding, total) for total in accumulate(best)]


@pytest.mark.parametrize("seed", range(10))
def test_of_one_sequence_the_tokens_count(seed: int) -> None:
    (chances,) = random_chances(seed, 1)
    assert worths(1, [chances]) == pytest.approx([1 + total for total in accumulate(chances)])


@pytest.mark.parametrize("seed", range(10))
def test_where_all_expect_the_same_the_sum_counts(seed: int) -> None:
    (chances,) = random_chances(seed, 1)
    found = worths(6, [chances] * 6)
    assert found[5::6] == pytest.approx([6 * (1 + total) for total in accumulate(chances)])


@pytest.mark.parametrize("seed", range(10))
def test_never_more_than_the_sum(seed: int) -> None:
    chances = random_chances(seed, 5)
    found = worths(7, chances)
    assert all(one < more for one, more in pairwise([7.0, *found]))
    tokens = [(gain, chance) for draft in chances for gain, chance in zip(gains(7, draft), draft, strict=True)]
    best_first = accumulate(chance for _, chance in sorted(tokens, reverse=True))
    assert all(one <= 7 + total + 1e-9 for one, total in zip(found, best_first, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_along_a_draft_tokens_gain_less_and_less(seed: int) -> None:
    """So the best tokens of all drafts are the beginnings of each."""
    for count, draft in enumerate(random_chances(seed, 20), 1):
        assert all(one > next_one for one, next_one in pairwise(gains(count, draft)))


def test_even_drafts_are_worth_more_than_one_long_one() -> None:
    even, long = 4 * sum(gains(4, [0.8])), sum(gains(4, [0.8] * 4))
    assert worth(4, even) > worth(4, long)


def test_goodputs_are_what_the_tokens_taken_so_far_are_worth_by_second() -> None:
    gained = gains(2, [0.9, 0.8, 0.5])
    found = goodputs(2, gained, [1.0, 2.0, 3.0, 4.0])
    expected = [2.0, worth(2, gained[0]) / 2, worth(2, gained[0] + gained[1]) / 3, worth(2, math.fsum(gained)) / 4]
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError):
        goodputs(2, gained, [1.0, 2.0])
