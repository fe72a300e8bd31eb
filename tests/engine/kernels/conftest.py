"""What the tests of kernels share: the native ones at each level of the CPU's instructions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pilotfish.engine.kernels.native import NativeKernels
from tests.support.native import LEVELS


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    kernels = NativeKernels(request.param)
    assert kernels.set_threads(3) == 3  # more than there are cores here: chunks are done out of order
    yield kernels
    kernels.set_threads(1)
