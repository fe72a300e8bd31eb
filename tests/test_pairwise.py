"""The helper that thins out products of test parameters."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairwise import covering, pairwise


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_every_two_values_meet_and_rows_are_few(sizes: list[int]) -> None:
    rows = covering(sizes)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(range(sizes[one]), range(sizes[other])))
    *_, second, first = sorted(sizes)
    assert first * second <= len(rows) <= min(math.prod(sizes), 2 * first * second + 4)
    assert rows == covering(sizes)


def test_marks_and_ids_of_values_are_kept() -> None:
    rows = pairwise([pytest.param(1, marks=pytest.mark.slow, id="one"), 2], ["a", "b"], [None])
    assert [row.values for row in rows] == [(1, "a", None), (1, "b", None), (2, "a", None), (2, "b", None)]
    assert [len(row.marks) for row in rows] == [1, 1, 0, 0]
    assert [row.id for row in rows] == ["one-a-None", "one-b-None", "2-a-None", "2-b-None"]
