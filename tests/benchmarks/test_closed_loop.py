"""The closed loop with which `benchmarks/check_planner.py` predicts a benchmark's time."""

from __future__ import annotations

import importlib

import pytest

from tests.support.paths import ROOT


def test_requests_in_a_closed_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    closed_loop = importlib.import_module("closed_loop")
    play, length = closed_loop.play, closed_loop.RequestLength
    calls = []

    def step(rows: int, sequences: int, context: int, decoding: int) -> float:
        calls.append((rows, sequences, decoding))
        return 1.0

    # Two at a time: 8 rows of prompt in one step, which gives the first token, then two more steps; twice.
    assert play([length(4, 3)] * 4, 2, 128, step) == 6
    assert calls == [(8, 2, 0), (2, 2, 2), (2, 2, 2)] * 2
    calls.clear()
    # A prompt longer than a step is read in chunks.
    assert play([length(100, 1)], 1, 32, step) == 4
    assert [rows for rows, *_ in calls] == [32, 32, 32, 4]
    # Three tokens a step: the first from the prompt, then 9 in three steps of 5 rows.
    calls.clear()
    assert play([length(4, 10)], 1, 128, step, drafted=4.0, tokens_per_step=3.0) == 4
    assert calls[1:] == [(5, 1, 1)] * 3
