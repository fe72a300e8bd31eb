"""LogitSpan: rows of logits that predict successive positions of a sequence; LogitRow: one of those rows."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from pilotfish.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class LogitSpan:
    """Rows of logits that predict successive positions of one sequence, as if `draft` had followed `sequence.tokens`.

    The last row predicts the token after the whole of `sequence.tokens + draft`, the row before it the token after
    `sequence.tokens + draft[:-1]`, and so on: row r of `rows` predicts position
    `len(sequence.tokens) + len(draft) + 1 - rows + r`, given everything before it. Verification of k drafted tokens has
    rows = k + 1; plain decoding is rows = 1 with no draft; a drafter's j-th step is rows = 1 with j tokens drafted.
    """

    sequence: Sequence
    draft: Seq[int] = ()
    rows: int = 1

    @property
    def first_position(self) -> int:
        """Index, in tokens from the start of the prompt, of the position that the first row predicts."""
        return len(self.sequence.tokens) + len(self.draft) + 1 - self.rows


class LogitRow(NamedTuple):
    """Row `at` of some logits predicts `position` (an index in tokens from the start of the prompt) of `sequence`."""

    at: int
    sequence: Sequence
    position: int


def rows_of(spans: Iterable[LogitSpan]) -> list[LogitRow]:
    """Return the rows of a batch of logits, in which the spans' rows follow each other."""
    rows: list[LogitRow] = []
    for span in spans:
        first = span.first_position
        rows += [LogitRow(len(rows) + r, span.sequence, first + r) for r in range(span.rows)]
    return rows
