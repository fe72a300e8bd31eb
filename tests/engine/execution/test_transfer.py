"""A pass's arrays in one buffer come out as they went in, here and in another process."""

from dataclasses import fields

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import HostBatch, Span, pack
from pilotfish.engine.execution.batch_layout import PER_ROW, BatchArrays
from pilotfish.engine.execution.buckets import Bucket
from pilotfish.engine.execution.graphs import _Padding

SIZE = 4


@st.composite
def spans(draw):
    start, length = draw(st.integers(0, 20)), draw(st.integers(1, 9))
    blocks = draw(st.lists(st.integers(0, 99), min_size=8, max_size=8))
    tokens = draw(st.lists(st.integers(0, 1 << 20), min_size=length, max_size=length))
    return Span(tokens, start, blocks, draw(st.integers(0, length)))


@given(st.lists(spans(), min_size=1, max_size=6))
def test_a_buffer_is_all_that_another_process_needs(several):
    packed = pack(several, SIZE)
    there = HostBatch.unpack(packed.shape, np.frombuffer(packed.buffer.tobytes(), dtype=np.uint8), SIZE)
    assert (there.query_lens, there.contexts) == (packed.query_lens, packed.contexts)
    assert there.contexts == [span.stop for span in several]
    for field in fields(BatchArrays):
        np.testing.assert_array_equal(getattr(packed.arrays, field.name), getattr(there.arrays, field.name))
    arrays = packed.arrays
    rows = [(span, position) for span in several for position in range(span.start, span.stop)]
    assert arrays.token_ids.tolist() == [token for span in several for token in span.token_ids]
    assert arrays.positions.tolist() == [position for _, position in rows]
    assert arrays.slots.tolist() == [span.blocks[position // SIZE] * SIZE + position % SIZE for span, position in rows]
    ends = np.cumsum([len(span.token_ids) for span in several])
    expected = [row for end, span in zip(ends, several, strict=True) for row in range(end - span.logit_rows, end)]
    assert arrays.logit_rows.tolist() == expected
    for table, span in zip(arrays.block_tables, several, strict=True):
        used = -(-span.stop // SIZE)
        assert table.tolist() == [*span.blocks[:used], *[0] * (len(table) - used)]


def test_a_steps_tensors():
    spans = [Span([5, 6, 7], 14, [3, 1], 2), Span([8], 0, [2])]
    host = pack(spans, 16)
    batch = host.to(torch.device("cpu"))
    arrays = batch.arrays
    assert arrays.token_ids.tolist() == [5, 6, 7, 8]
    assert arrays.positions.tolist() == [14, 15, 16, 0]
    assert arrays.logit_rows.tolist() == [1, 2]
    attention = batch.attention
    assert attention.slots.tolist() == [3 * 16 + 14, 3 * 16 + 15, 16, 32]
    assert attention.cu_query_lens.tolist() == [0, 3, 4]
    assert attention.context_lens.tolist() == [17, 1]
    assert attention.cu_context_lens.tolist() == [0, 17, 18]
    assert attention.block_tables.tolist() == [[3, 1], [2, 0]]
    int32 = (attention.cu_query_lens, attention.context_lens, attention.cu_context_lens, attention.block_tables)
    assert {tensor.dtype for tensor in int32} == {torch.int32}
    wide = (arrays.token_ids, arrays.positions, arrays.logit_rows, attention.slots)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    every = (*int32, *wide)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 8 == 0 for tensor in every)
    first, last = host.buffer.ctypes.data, host.buffer.ctypes.data + host.buffer.nbytes
    assert all(first <= tensor.data_ptr() <= last - tensor.nbytes for tensor in every)


@given(st.lists(spans(), min_size=1, max_size=6), st.integers(0, 40))
def test_a_padded_batch_has_every_row_of_the_batch(several, more):
    """By name, whatever arrays there are; the bucket has more rows and spans than the batch."""
    packed = pack(several, SIZE)
    rows, count = packed.shape.rows, len(several)
    padding, length = _Padding(SIZE, 100), max(packed.query_lens) + 1
    bucket = Bucket(rows + more, count + 1, length, rows, -(-more // length))
    assert bucket.fits(count, max(packed.query_lens), rows, packed.shape.wanted)
    buffer, width = padding.fill(bucket, packed)
    arrays = padding.layout(bucket, width).on_host(buffer)
    for name in PER_ROW:
        np.testing.assert_array_equal(getattr(arrays, name)[..., :rows], getattr(packed.arrays, name))
    assert set(arrays.slots[rows:] // SIZE) <= {100}
    np.testing.assert_array_equal(arrays.logit_rows[: packed.shape.wanted], packed.arrays.logit_rows)
    for name in ("context_lens", "cu_query_lens", "block_tables"):
        given = getattr(packed.arrays, name)
        np.testing.assert_array_equal(getattr(arrays, name)[tuple(map(slice, given.shape))], given)
    # Each row of padding belongs to a span that sees its own rows in the padding block.
    lengths = np.diff(arrays.cu_query_lens)
    assert arrays.cu_query_lens[-1] == bucket.rows
    assert lengths.max() <= length
    np.testing.assert_array_equal(arrays.context_lens[count:], lengths[count:])
    assert (arrays.block_tables[count:] == 100).all()
    assert width * SIZE >= arrays.context_lens.max()
    np.testing.assert_array_equal(np.diff(arrays.cu_context_lens), arrays.context_lens)
