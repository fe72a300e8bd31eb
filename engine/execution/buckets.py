"""Buckets: the sizes of passes that are captured as graphs. No torch: the planner counts them, too. `graphs` has the
captured passes themselves.

Kernels read the spans' lengths on the device, so a bucket is a number of rows and bounds, however the rows are divided
among the sequences: plain decoding (one row each), verification (drafts of any lengths), and steps with chunks of
prompts. A batch goes to the bucket with the fewest rows that it fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

FREE_ROWS = 64
"""Rows to which any pass may be padded, since reading the weights takes most of the time up to there; beyond it a pass
is padded to at most WASTE times its own rows. Assumed, not measured."""
WASTE = 2
MOST_ROWS = 1024
"""Rows of the largest captured pass: beyond it kernels run longer than their launches take."""
SPANS = 4
"""Ratio of successive bounds of the number of sequences. Attention kernels divide the GPU by the bound: a pass over one
sequence should not be divided as one over 64 is."""
CHUNK_ROWS = (64, 128, 256, 512)
"""Rows of the captured steps with chunks of prompts."""
CHUNK_SPANS = 16
"""The lowest bound of sequences in them."""

GRAPH_SHARE = 0.05
"""Share of the memory left by the weights that captured graphs may take by default."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Passes that are padded to `rows` rows. Batches of this bucket have at most `spans` sequences, `length` rows of
    each, and `wanted` rows whose logits are wanted."""

    rows: int
    spans: int
    length: int
    wanted: int
    spare: int = 0
    """Further spans, for the rows of padding."""

    def fits(self, spans: int, longest: int, rows: int, wanted: int) -> bool:
        """Whether a batch of this size can be padded to the bucket. Padding spans are no longer than `length`, too."""
        if spans > self.spans or longest > self.length or wanted > self.wanted:
            return False
        return 0 <= self.rows - rows <= (self.spans + self.spare - spans) * self.length


def row_sizes(most: int) -> tuple[int, ...]:
    """The sizes 1, 2, 4, 8, then two per doubling: 12, 16, 24, 32, ...; the last is `most`."""
    sizes = [1, 2, 4]
    step = 4
    while sizes[-1] < most:
        sizes += [2 * step, 3 * step]
        step *= 2
    return (*(size for size in sizes if size < most), most)


def span_bounds(max_num_seqs: int, first: int = 1) -> tuple[int, ...]:
    """The bounds of the number of sequences: `first`, then SPANS times as many, ...; the last is `max_num_seqs`."""
    bounds = [first]
    while bounds[-1] < max_num_seqs:
        bounds.append(bounds[-1] * SPANS)
    return (*bounds[:-1], max_num_seqs)


def buckets(max_num_seqs: int, num_draft_tokens: int, max_rows: int, chunks: bool = True) -> tuple[Bucket, ...]:
    """The buckets of passes of at most `max_rows` rows, in ascending order. `chunks`: with those of steps with chunks
    of prompts."""
    found = {Bucket(rows, rows, 1, rows) for rows in row_sizes(max_num_seqs)}
    if num_draft_tokens:
        found.update(_verifying(max_num_seqs, 1 + num_draft_tokens, min(max_rows, MOST_ROWS)))
    if chunks:
        found.update(_with_chunks(max_num_seqs, 1 + num_draft_tokens))
    return tuple(sorted(bucket for bucket in found if bucket.rows <= max_rows))


def _verifying(max_num_seqs: int, length: int, max_rows: int) -> Iterator[Bucket]:
    """Buckets of spans of at most `length` rows."""
    fewer = 0
    for bound in span_bounds(max_num_seqs):
        most = min(max_rows, bound * length)
        # One more sequence than the bound before has, and one drafted token.
        least = fewer + 2
        sizes: Seq[int] = range(2, most + 1) if bound == 1 else [n for n in row_sizes(most) if n >= least]
        before = least - 1
        for rows in sizes:
            yield Bucket(rows, bound, length, rows, -(-(rows - before - 1) // length))
            before = rows
        fewer = bound


def _with_chunks(max_num_seqs: int, length: int) -> Iterator[Bucket]:
    """Buckets of spans of any length, of which all but the last draw at most `length` rows of logits."""
    for rows in CHUNK_ROWS:
        for bound in span_bounds(max_num_seqs, CHUNK_SPANS):
            yield Bucket(rows, min(bound, rows), rows, min(rows, bound * length), 1)


def fitting(captured: Seq[Bucket], spans: int, longest: int, rows: int, wanted: int) -> Bucket | None:
    """The first of `captured`, which is in ascending order, that fits a pass of this size; None if none is worth it."""
    most = max(FREE_ROWS, WASTE * rows)
    for at in range(bisect_left(captured, rows, key=_rows), len(captured)):
        bucket = captured[at]
        if bucket.rows > most:
            return None
        if bucket.fits(spans, longest, rows, wanted):
            return bucket
    return None


def _rows(bucket: Bucket) -> int:
    return bucket.rows
