"""All pairs instead of all combinations: parameters for tests with three factors or more.

What breaks one combination of three values and no pair of them is rare; a bug shows with one value, or with two that
meet. Every two values of different factors meet in some row here, in a number of rows that is near the product of the
two longest factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(*factors: Iterable[Any]) -> list[Any]:
    """Rows with one value of each factor, for `pytest.mark.parametrize`: the same ones each time, first values first.
    A value may be a `pytest.param`, whose marks and id its rows get."""
    choices = [list(factor) for factor in factors]
    return [
        _param([values[index] for values, index in zip(choices, row, strict=True)])
        for row in covering([len(values) for values in choices])
    ]


def covering(sizes: list[int]) -> list[tuple[int, ...]]:
    """Rows of indices below `sizes`, in which every two of different columns meet. Greedy: a row begins with the first
    pair that has not met, and each further column takes the index that meets most of the others for the first time."""
    columns = range(len(sizes))
    unmet = {
        ((one, i), (other, j)): None  # a set in order
        for one, other in itertools.combinations(columns, 2)
        for i in range(sizes[one])
        for j in range(sizes[other])
    }
    rows = []
    while unmet:
        row = dict(next(iter(unmet)))
        for column in columns:
            if column not in row:
                new = [sum(_pair(column, i, *entry) in unmet for entry in row.items()) for i in range(sizes[column])]
                row[column] = new.index(max(new))
        for one, other in itertools.combinations(columns, 2):
            unmet.pop(((one, row[one]), (other, row[other])), None)
        rows.append(tuple(row[column] for column in columns))
    return sorted(rows)


def _pair(column: int, index: int, other: int, other_index: int) -> tuple[tuple[int, int], tuple[int, int]]:
    one, two = (column, index), (other, other_index)
    return (one, two) if column < other else (two, one)


def _param(values: list[Any]) -> Any:
    plain: list[Any] = []
    marks: list[Any] = []
    names: list[str] = []
    for value in values:
        if isinstance(value, type(pytest.param())):
            (inner,) = value.values
            plain.append(inner)
            marks += value.marks
            names.append(str(value.id or inner))
        else:
            plain.append(value)
            names.append(str(value).replace(" ", ""))
    return pytest.param(*plain, marks=marks, id="-".join(names))
