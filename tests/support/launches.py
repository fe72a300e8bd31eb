"""Counts the kernels that a computation launches, on fake CUDA tensors: each operator has a stated number of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NONE = """view _unsafe_view slice select split split_with_sizes chunk t transpose permute unsqueeze squeeze expand alias
detach as_strided empty new_empty empty_strided empty_like unbind lift_fresh device"""
"""Operators that launch nothing: views, and memory that is not filled."""
ONE = """mm addmm _scaled_mm embedding index_select index index_put_ add add_ mul mul_ sub div div_ neg abs amax clamp
clamp_ pow mean nan_to_num rsqrt where copy_ _to_copy clone cat silu gelu _fused_rms_norm"""
"""Operators of one kernel. A product may be cut along its sum and then has a second one for the parts, as
cuBLAS chooses for the card: that is not counted."""
LAUNCHES = dict.fromkeys(NONE.split(), 0) | dict.fromkeys(ONE.split(), 1)


class Launches(TorchDispatchMode):
    """Counts what is launched while it is entered, by name: torch's operators, and what calls `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def add(self, name: str, launches: int = 1) -> None:
        self.count[name] += launches

    @property
    def total(self) -> int:
        return sum(self.count.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in LAUNCHES:
            raise AssertionError(f"state how many kernels {func} launches")
        self.add(name, LAUNCHES[name])
        return func(*args, **(kwargs or {}))

    def triton(self, name: str) -> Any:
        """Stand in for a Triton kernel, which is called as kernel[grid](...)."""

        class Kernel:
            def __getitem__(_, grid: tuple[int, ...]) -> Callable[..., None]:
                assert all(size > 0 for size in grid)
                return lambda *args, **kwargs: self.add(name)

        return Kernel()

    def attention(self, name: str, launches: int) -> Callable[..., torch.Tensor]:
        """Stand in for an attention function of a library."""

        def call(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.add(name, launches)
            return query.new_empty(query.shape)

        return call
