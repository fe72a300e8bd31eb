"""Memory in huge pages: pieces of an arena are zeros of their own, and the system is asked as it wants to be asked."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.kernels import memory
from pilotfish.engine.kernels.memory import ALIGNMENT, HUGE_PAGE, Arena
from pilotfish.engine.kernels.native import NativeKernels

SIZES = st.lists(st.integers(0, 3000) | st.integers(0, 300_000), max_size=30)


@settings(deadline=None)
@given(SIZES)
def test_pieces_are_zeros_of_their_own(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CHUNK", 1 << 18)
        arena = Arena()
        pieces = [arena.zeros((2, size), torch.float32) for size in sizes]
        for number, piece in enumerate(pieces):
            assert piece.shape == (2, sizes[number])
            assert piece.is_contiguous()
            assert piece.numel() == 0 or piece.data_ptr() % ALIGNMENT == 0
            assert not piece.any()
            piece.fill_(number + 1)
        for number, piece in enumerate(pieces):
            assert (piece == number + 1).all()


def test_a_mapping_is_freed_with_the_last_of_its_tensors() -> None:
    arena = Arena()
    one, other = (arena.zeros((20 << 18,), torch.float32).fill_(1.0) for _ in range(2))
    start = one.data_ptr()
    assert other.data_ptr() == start + (20 << 20)
    del arena, one
    gc.collect()
    assert flags(start)
    assert (other == 1.0).all()
    del other
    with pytest.raises(LookupError):
        flags(start)


def test_weights_lie_in_mappings_for_which_huge_pages_are_asked() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists():
        pytest.skip("this kernel has no huge pages")
    kernels = NativeKernels()
    weights = [kernels.prepare_panels(torch.ones(64, 64)) for _ in range(2)]
    weights += [kernels.prepare_panels(torch.ones(32, HUGE_PAGE // 128 + 7)), kernels.prepare_panels(torch.ones(1, 64))]
    for weight in weights:
        assert "hg" in flags(weight.packed.data_ptr())
    cache = memory.zeros((HUGE_PAGE,), torch.bfloat16)
    assert "hg" in flags(cache.data_ptr())
    assert cache.data_ptr() % HUGE_PAGE == 0


def flags(address: int) -> list[str]:
    """Of the mapping that the address is in (proc(5), VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(header[1], 16) <= address < int(header[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"{address:#x}")
