"""Marks and parameters for tests of the native kernels, which are skipped where those were not built."""

from __future__ import annotations

import pytest

from pilotfish.engine.kernels.native import NativeKernels, load_library

BUILT = load_library() is not None

needs_native = pytest.mark.skipif(not BUILT, reason="the native kernels were not built here (no C compiler)")

BOTH = (pytest.param("native", marks=needs_native), "torch")
"""Names of the CPU's sets of kernels, to parametrize with."""

LEVELS = [
    pytest.param(level, marks=needs_native, id=("default", "avx2", "avx512")[level])
    for level in range(NativeKernels().level + 1 if BUILT else 1)
]
"""Instruction sets that this CPU has, to parametrize with."""
