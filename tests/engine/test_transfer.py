"""A step's arrays in one buffer come out as they went in."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from engine.execution.spans import Span, flatten
from engine.execution.transfer import packed_to

ARRAYS = st.sampled_from([np.int32, np.int64]).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9))
)


@given(st.lists(ARRAYS, min_size=1, max_size=8))
def test_arrays_come_out_as_they_went_in(arrays):
    tensors = packed_to(torch.device("cpu"), *arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 8 == 0 or not tensor.numel()
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_steps_tensors():
    spans = [Span([5, 6, 7], 14, [3, 1], 2), Span([8], 0, [2])]
    batch = flatten(spans, 16, torch.device("cpu"))
    assert batch.token_ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [14, 15, 16, 0]
    assert batch.logit_rows.tolist() == [1, 2]
    attention = batch.attention
    assert attention.slots.tolist() == [3 * 16 + 14, 3 * 16 + 15, 16, 32]
    assert attention.cu_query_lens.tolist() == [0, 3, 4]
    assert attention.context_lens.tolist() == [17, 1]
    assert attention.cu_context_lens.tolist() == [0, 17, 18]
    assert attention.block_tables.tolist() == [[3, 1], [2, 0]]
    int32 = (attention.cu_query_lens, attention.context_lens, attention.cu_context_lens, attention.block_tables)
    assert {tensor.dtype for tensor in int32} == {torch.int32}
