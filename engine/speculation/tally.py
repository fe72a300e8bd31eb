"""What came of a step's drafts, counted for the metrics."""

from __future__ import annotations

from collections.abc import Iterable


def by_position(counts: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Of (drafter, tokens) for each of some drafts, how many drafts reach each position, the first position first.

    The same of drafted tokens and of accepted ones: both are the beginning of a draft.
    """
    tally: dict[str, list[int]] = {}
    for drafter, tokens in counts:
        if not tokens:
            continue
        positions = tally.setdefault(drafter, [])
        positions.extend([0] * (tokens - len(positions)))
        for position in range(tokens):
            positions[position] += 1
    return {drafter: tuple(positions) for drafter, positions in tally.items()}
