"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.heads import train_head
from tests.support.native import BOTH
from tests.support.parity import KernelsName
from tests.support.tiny import make_tiny


@pytest.fixture(scope="module", params=BOTH)
def kernels(request: pytest.FixtureRequest) -> KernelsName:
    """The name of a set of kernels: tests run on each that is there."""
    return request.param


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model for the tiny llama: not that model, and not unlike it: one of its two layers."""
    return make_tiny("llama", tmp_path_factory.mktemp("draft") / "draft", num_hidden_layers=1)


@pytest.fixture(scope="session")
def head(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 head for the tiny llama, trained for a moment: now and then it is right."""
    return train_head(tiny("llama"), tmp_path_factory.mktemp("head") / "head")


@pytest.fixture
def soiled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out unset holds NaN, as it may."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _soiled(getattr(owner, name)))


def _soiled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = make(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made
