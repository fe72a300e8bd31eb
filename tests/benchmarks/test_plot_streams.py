"""The picture of scaling: means by load, where both arms were measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("plot_streams")


def row(arm: str, load: int, speed: float) -> dict[str, Any]:
    return {"model": "tiny", "arm": arm, "concurrency": load, "tokens_per_second": speed, "speedup": speed / 5}


def test_means_of_the_loads_that_both_arms_have_are_drawn(plot: Any, tmp_path: Path) -> None:
    rows = [row("vanilla", 4, 10.0), row("vanilla", 4, 20.0), row("auto", 4, 30.0), row("ngram", 4, 99.0)]
    rows += [row("auto", 1, 8.0), row("vanilla", 1, 5.0), row("vanilla", 16, 50.0)]
    found = plot.curves(rows)
    assert found == {
        "tiny": {"vanilla": {1: (5.0, 1.0), 4: (15.0, pytest.approx(8**0.5))}, "auto": {1: (8.0, 1.6), 4: (30.0, 6.0)}}
    }
    for name in ("a.svg", "b.svg"):
        plot.draw(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    ElementTree.parse(tmp_path / "a.svg")
