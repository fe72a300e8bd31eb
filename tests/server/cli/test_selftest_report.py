"""`pilotfish selftest --report`: steps, their report, and going on with it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pilotfish.server.cli import main as cli
from pilotfish.tools.selftest import run
from pilotfish.tools.selftest.check import Finding, Result
from pilotfish.tools.selftest.page import PLOTS, page_of
from pilotfish.tools.selftest.report import JSON, PAGE, STEPS, Report
from tests.support.native import needs_native
from tests.support.paths import ROOT

pytestmark = [needs_native, pytest.mark.process, pytest.mark.slow]

QUICK = ["selftest", "--quick", "--num-threads", "1"]


def test_steps_are_kept_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    command = [*QUICK, "--report", str(folder), "--steps"]
    assert cli.main([*command, "passes"]) == 0
    first = json.loads((folder / JSON).read_text())
    assert cli.main([*command, "passes,profile"]) == 0
    assert "passes: done already" in capsys.readouterr().out
    both = json.loads((folder / JSON).read_text())
    assert both["steps"]["passes"] == first["steps"]["passes"]
    assert list(both["steps"]) == ["passes", "profile"]
    assert all(step["complete"] for step in both["steps"].values())
    assert {result["verdict"] for result in both["steps"]["passes"]["results"]} == {"measured"}
    page = (folder / PAGE).read_text()
    assert "no GPU: small models stand in" in page
    assert page.count("<svg") >= 1
    assert not re.search(r"(src|href)=", page)
    assert sorted(path.name for path in folder.iterdir()) == [PAGE, JSON]


def test_a_step_that_was_cut_off_is_repeated(tmp_path: Path) -> None:
    command = [*QUICK, "--report", str(tmp_path), "--steps", "profile"]
    assert cli.main(command) == 0
    content = json.loads((tmp_path / JSON).read_text())
    content["steps"]["profile"] |= {"complete": False, "results": []}
    (tmp_path / JSON).write_text(json.dumps(content))
    assert cli.main(command) == 0
    assert len(json.loads((tmp_path / JSON).read_text())["steps"]["profile"]["results"]) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "passes"], "give --report"),
        (["--report", "{}", "--steps", "passes,speeds"], "'speeds', but the steps are peaks"),
        (["--report", "{}", "--json", "{}/result.json"], "leave out json"),
        (["--report", "{}/file"], "cannot be used"),
        (["--report", "{}/other"], "none of this program"),
        (["--report", "{}/h200", "--steps", "profile"], "other machine"),
    ],
)
def test_wrong_flags(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / JSON).write_text("[]")
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / JSON).write_bytes((ROOT / "benchmarks/results/gpu/h200" / JSON).read_bytes())
    assert cli.main([*QUICK, *(flag.format(tmp_path) for flag in flags)]) == 2
    assert said in capsys.readouterr().err


def test_a_step_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import selftest_child

    monkeypatch.setattr(run, "child", selftest_child)
    found = list(run.run_group(None, "sleep", lambda group, name: None, 60.0, group_limit=5.0))  # type: ignore[arg-type]
    assert [result.name for result in found] == ["a", "b"]
    assert found[-1].verdict == "failed"
    assert "step took too long" in found[-1].detail


def test_the_h200s_page_is_made_of_its_report() -> None:
    import msgspec

    from pilotfish.tools.selftest.page import Section

    folder = ROOT / "benchmarks/results/gpu/h200"
    report = msgspec.json.decode((folder / JSON).read_bytes(), type=Report)
    assert set(report.steps) <= set(STEPS)
    sections = [Section(name, STEPS[name], step.results, step.complete) for name, step in report.steps.items()]
    page = page_of(report.environment, report.pilotfish, sections)
    assert page.count("<svg") == len(PLOTS)
    HTMLParser().feed(page)


@pytest.mark.parametrize(
    ("measured", "verdict"), [(0.4, "failed"), (0.6, "warned"), (0.7, "passed"), (float("nan"), "failed")]
)
def test_less_than_a_healthy_machine_reaches_is_warned_of(measured: float, verdict: str) -> None:
    assert Finding(measured=measured, bound=0.5, expected=0.65, at_least=True).verdict == verdict


def test_what_results_say_is_text() -> None:
    from pilotfish.tools.selftest.page import _table

    assert "<b>" not in _table([Result(group="a", name="<b>", verdict="failed", detail="<b>", values={"<b>": 1.0})])
