"""Packing spans: few rows, packed one by one, and many give the same arrays, which are the same memory on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.execution import batch
from pilotfish.engine.execution.batch import Span, pack
from pilotfish.engine.execution.batch_layout import BatchArrays

BLOCK = 16


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    spans = []
    for _ in range(draw(st.integers(1, 5))):
        start, length = draw(st.integers(0, 70)), draw(st.integers(1, 20))
        count = -(-(start + length) // BLOCK) + draw(st.integers(0, 2))
        blocks = draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))
        tokens = draw(st.lists(st.integers(0, 49151), min_size=length, max_size=length))
        spans.append(Span(tokens, start, blocks, draw(st.integers(0, length)), adapter=draw(st.integers(0, 2))))
    return spans


@given(span_lists(), st.integers(0, 20))
def test_few_rows_are_packed_as_many(spans: list[Span], ahead: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        packed = []
        for most in (0, 1000):
            patch.setattr(batch, "FEW_ROWS", most)
            packed.append(pack(spans, BLOCK, ahead))
    many, few = packed
    assert many.shape == few.shape
    assert (many.query_lens, many.contexts) == (few.query_lens, few.contexts)
    assert np.array_equal(many.buffer, few.buffer)
    row = 0
    for span in spans:
        for position in range(span.start, span.stop):
            assert few.arrays.slots[row] == span.blocks[position // BLOCK] * BLOCK + position % BLOCK
            row += 1


def test_on_the_cpu_it_is_the_same_memory() -> None:
    host = pack([Span([1, 2, 3], 5, [4, 2], 1)], BLOCK)
    arrays = host.to(torch.device("cpu")).arrays
    other = host.layout.on_device(torch.from_numpy(host.buffer))
    names = BatchArrays.__dataclass_fields__
    assert len({getattr(other, name).untyped_storage().data_ptr() for name in names}) == 1  # so one copy takes it
    for name in ("token_ids", "positions", "slots", "cu_query_lens", "block_tables", "temperatures", "logit_rows"):
        ours, theirs = getattr(arrays, name), getattr(other, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() == theirs.data_ptr()
