"""What the tests of execution share: a CUDA device that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_cuda import fake_tensors


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_tensors(monkeypatch):
        yield
