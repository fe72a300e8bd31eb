"""The engine's own work in a step, which a GPU would wait for: bounded in processor time, and generously, since this
machine may be slow and busy. The figures are benchmarks/step_overhead.py's."""

from __future__ import annotations

import importlib.util
import statistics

import pytest

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from tests.support.paths import ROOT

PROGRAM = ROOT / "benchmarks" / "step_overhead.py"
MOST_MS = 8.0
"""Four times what it should take."""


@pytest.mark.parametrize(("drafted", "controlled"), [(0, False), (4, False), (4, True)])
def test_a_step_of_64_sequences(drafted: int, controlled: bool) -> None:
    spec = importlib.util.spec_from_file_location("step_overhead", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    core = program.idle_core(64, drafted, controlled)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for i in range(64):
        prompt = tuple(range(i, i + 100))
        core.add(Request(id=str(i), prompt_ids=prompt, params=params, speculation="idle" if drafted else "off"))
    series = program.measure(core, 64)
    assert statistics.fmean(series["rows"]) >= 64 * (1 + drafted / 2)
    assert statistics.median(series["host work, processor time"]) < MOST_MS
