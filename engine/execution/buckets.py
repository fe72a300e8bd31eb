"""Buckets: the sizes of passes that are captured as graphs, by sequences and tokens of each. No torch: the planner
counts them, too. `graphs` has the captured passes themselves."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

FREE_ROWS = 64
"""Rows to which any pass may be padded, since reading the weights takes most of the time up to there; beyond it a pass
is padded to at most WASTE times its own rows. Assumed, not measured."""
WASTE = 2

GRAPH_SHARE = 0.05
"""Share of the memory left by the weights that captured graphs may take by default."""
DRAFT_LENGTHS = (1, 2)
"""Tokens of a sequence in a captured pass of a draft model: one that the target chose, or two if it accepted all
drafted ones, the last of which has not been run. A longer first pass is computed eagerly."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Passes of at most `spans` sequences and `length` tokens of each, which are padded to this size."""

    spans: int
    length: int

    @property
    def rows(self) -> int:
        return self.spans * self.length


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of sequences: 1, 2, 4, 8, then two per doubling: 12, 16, 24, 32, ...; the last is `max_num_seqs`."""
    sizes = [1, 2, 4]
    step = 4
    while sizes[-1] < max_num_seqs:
        sizes += [2 * step, 3 * step]
        step *= 2
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def span_lengths(num_draft_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens: 1, and 2, 3, 5, 9, ... with drafts of 1, 2, 4, 8, ..., `num_draft_tokens`."""
    lengths = [1]
    drafted = 1
    while drafted < num_draft_tokens:
        lengths.append(1 + drafted)
        drafted *= 2
    return (*lengths, 1 + num_draft_tokens) if num_draft_tokens else (1,)


def buckets(batches: Seq[int], lengths: Seq[int], max_rows: int) -> tuple[Bucket, ...]:
    """The buckets in the order of their capture, fewest rows first: a graph saves most where kernels are short."""
    every = (Bucket(spans, length) for spans in batches for length in lengths)
    return tuple(sorted((bucket for bucket in every if bucket.rows <= max_rows), key=lambda b: (b.rows, b.length)))


def fitting(captured: Seq[Bucket], spans: int, longest: int, rows: int) -> Bucket | None:
    """The first of `captured`, which is in order of size, that fits a pass of this size; None if none is worth it."""
    for bucket in captured:
        if bucket.spans >= spans and bucket.length >= longest:
            return bucket if bucket.rows <= max(FREE_ROWS, WASTE * rows) else None
    return None
