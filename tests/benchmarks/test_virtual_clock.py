"""The controller's benchmark in virtual time, on recordings of a few tokens made by hand: seconds are what the table
says, and the same in each run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    modules = [importlib.import_module(f"virtual_{name}") for name in ("costs", "record", "engine")]
    return SimpleNamespace(Costs=modules[0].Costs, Recorded=modules[1].Recorded, Engine=modules[2].Engine)


def costs(virtual: SimpleNamespace) -> Any:
    """A row costs 1 ms more to read, and 1 more to verify; a pass of the draft 1 however many there are."""
    return virtual.Costs(
        verifying={1: 10.0, 2: 12.0, 12: 32.0},
        reading={1: 10.0, 2: 11.0, 12: 21.0},
        context_token=0.5,
        drafting={"head": {1: 1.0, 64: 1.0}},
        step=1.0,
        sequence=0.25,
    )


def question(prompt: list[int], answer: list[int], right: int, heads: tuple[str, ...]) -> dict[str, Any]:
    """With drafts of up to 8 tokens, the first `right` of which are the answer's."""
    drafts = []
    for place in range(1, len(answer)):
        tokens = [token if i < right else -1 for i, token in enumerate(answer[place : place + 8])]
        drafts.append((tokens, [0.9 if token >= 0 else 0.1 for token in tokens]))
    return {"prompt": prompt, "answer": answer, "drafts": dict.fromkeys(heads, drafts)}


def questions(virtual: SimpleNamespace, *asked: dict[str, Any]) -> list[Any]:
    return [virtual.Recorded(tuple(each["prompt"]), each["answer"], each["drafts"]) for each in asked]


def test_vanillas_seconds_are_the_tables(virtual: SimpleNamespace) -> None:
    asked = questions(virtual, question([1, 2, 3, 4], [5, 6, 7], 8, ("head",)), question([8, 9, 8], [9, 8], 8, ()))
    # Reading, the head's rows beyond those that are read, context; the step's own work.
    first = 13 + 0 + 0 + 1.25, 10 + 0 + 4 * 0.5 + 1.25, 10 + 0 + 5 * 0.5 + 1.25
    second = 12 + 0 + 0 + 1.25, 10 + 0 + 3 * 0.5 + 1.25
    together = 16 + 1 + 0 + 1.5, 11 + 1 + (4 + 3) * 0.5 + 1.5, first[2]
    for load, milliseconds in ((1, sum(first + second)), (2, sum(together))):
        visit = virtual.Engine({"max_tokens": 8}, costs(virtual)).visit(asked, (), load)
        assert visit.seconds == pytest.approx(1e-3 * milliseconds, rel=1e-12)
        assert (visit.tokens, visit.decoded, visit.drafting, visit.drafted) == (5, 3, 0.0, {})


def test_a_drafts_passes_and_tokens_count(virtual: SimpleNamespace) -> None:
    """A draft that is always right, for which each pass takes a millisecond."""
    asked = questions(virtual, question([1, 2, 3], list(range(10, 74)), 8, ("head",)))
    plain, drafted = (
        virtual.Engine({"max_tokens": 64}, costs(virtual)).visit(asked, drafters, 1) for drafters in ((), ("head",))
    )
    assert drafted.tokens == plain.tokens == 64
    assert drafted.steps + drafted.accepted["head"] == plain.steps == 63
    assert drafted.accepted == drafted.drafted
    passes = 1e3 * drafted.drafting
    assert passes >= drafted.drafted["head"]
    assert passes == pytest.approx(round(passes))
    assert drafted.seconds < 0.8 * plain.seconds


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_a_recording_gives_the_same_seconds_each_time(virtual: SimpleNamespace, jitter: float) -> None:
    answer = [10, 11, 12, 13] * 8
    asked = questions(virtual, *(question([1, 2, i], answer, i % 3, ("head",)) for i in range(6)))
    visits = []
    for _ in range(2):
        engine = virtual.Engine({"max_tokens": 32}, costs(virtual), jitter)
        visits.append([engine.visit(asked, engine.names, load) for load in (1, 4)])
    assert visits[0] == visits[1]
    assert all(visit.tokens == 6 * 32 and visit.drafted for visit in visits[0])


@pytest.mark.process
def test_replay_prints_the_same_table_each_time(tmp_path: Path) -> None:
    """Whatever order sets and hashes have."""
    heads = ("smollm2-135m-eagle3", "smollm2-135m-eagle3-small")
    asked = [question([1, 2, i], [10, 11, 12, 13] * 8, i, heads) for i in range(3)]
    recording = tmp_path / "recording.json"
    recording.write_text(json.dumps({"model": "smollm2-135m", "max_tokens": 32, "suites": {"by hand": asked}}))
    tables = [
        subprocess.run(
            [sys.executable, "benchmarks/virtual_clock.py", "replay", str(recording), "--concurrency", "1,3"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert tables[0] == tables[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[0].splitlines() if "|" in line]
    assert rows[0][:2] == ["suite", "streams"]
    assert rows[0][2:7] == ["ngram", "suffix", *heads, "auto"]
    assert [row[:2] for row in rows[2:]] == [["by hand", "1"], ["by hand", "3"]]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[2:8])
