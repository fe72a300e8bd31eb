"""A CUDA device that is not there: torch's fake tensors know shapes, dtypes and devices, but have no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.flash import Flash2Attention, Flash4Attention
from pilotfish.engine.layers.attention.torch import TorchAttention

CUDA = torch.device("cuda", 0)


def getitem(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """tensor[index]. torch's own asks for CUDA's device guard first, which a build without CUDA has not; so do some
    other methods."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        match part:
            case slice(start=start, stop=stop, step=None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, start, stop)
            case int():
                tensor, dim = torch.ops.aten.select.int(tensor, dim, part), dim - 1
            case None:
                tensor = tensor.unsqueeze(dim)
            case torch.Tensor():
                assert part.dtype == torch.int64, "a boolean mask waits for the device, another dtype is copied first"
                tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [part])
            case _:
                raise NotImplementedError(part)
        dim += 1
    return tensor


@contextmanager
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor made inside is a fake one, on whatever device it is said to be."""
    methods = {
        "__getitem__": getitem,
        "__setitem__": lambda tensor, index, value: getitem(tensor, index).copy_(value),
        "copy_": lambda tensor, source, non_blocking=False: torch.ops.aten.copy_.default(tensor, source, non_blocking),
        "contiguous": lambda tensor: (
            tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
        ),
        "pin_memory": lambda tensor: tensor,
    }
    for name, method in methods.items():
        monkeypatch.setattr(FakeTensor, name, method, raising=False)
    with FakeTensorMode():
        yield


def on_cuda(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands in for an attention kernel: an output of the right shape, on the query's device."""
    return query.new_empty(query.shape)


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "torch": TorchAttention,
    "flash2": lambda: Flash2Attention(on_cuda, on_cuda),
    "flash4": lambda: Flash4Attention(lambda *args, **kwargs: (on_cuda(*args), None), split=True),
}
