"""Aligned Markdown tables, readable in a terminal, and the table of `pilotfish bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pilotfish.tools.bench.rows import Summary


def table(summaries: Sequence[Summary]) -> list[str]:
    """Return the table's lines: for each concurrency and arm, the speed-ups over vanilla and their geometric mean."""
    suites = list(summaries[0].speedups)
    head = ["streams", "arm", *suites, "mean", "tokens/s", "tokens/step", "same text"]
    body = [
        [
            str(each.concurrency),
            each.arm,
            *(f"{each.speedups[suite]:.2f}x" for suite in suites),
            f"{each.speedup:.2f}x",
            f"{each.tokens_per_second:.1f}",
            f"{each.mean_accepted_length:.2f}",
            "yes" if each.identical_text else "NO",
        ]
        for each in summaries
    ]
    return aligned(head, body, left=("arm",))


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Return the lines of a Markdown table: columns are right-aligned, except those named in `left`."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    to_left = [name in left for name in head]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(cells, widths, to_left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rules = [
        "-" * (width + 2) if flush else "-" * (width + 1) + ":" for width, flush in zip(widths, to_left, strict=True)
    ]
    return [line(head), f"|{'|'.join(rules)}|", *map(line, body)]
