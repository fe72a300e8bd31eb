"""The recording of a terminal: what was on the screen, when it was, and nothing that a text could turn into markup."""

from __future__ import annotations

import importlib
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.paths import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("record_terminal")


def frame(recording: Any, at: float, *lines: str, colour: str = "default") -> Any:
    screen = {
        (row, column): recording.Cell(text, colour if text.isupper() else "default", False)
        for row, line in enumerate(lines)
        for column, text in enumerate(line)
        if text.strip()
    }
    return recording.Frame(at, screen)


def test_what_comes_and_goes_together_in_one_style_is_one_run(recording: Any) -> None:
    frames = [
        frame(recording, 0.0, "$"),
        frame(recording, 1.0, "$ ls", "abCD", colour="green"),
        frame(recording, 2.0, "$ ls", "abCDef", colour="green"),
        frame(recording, 3.0, "$ ls", "xbCDef", colour="green"),
    ]
    end = 3.0 + recording.PAUSE
    found = {(run.text, run.row, run.column, run.since, run.until, run.colour) for run in recording.runs_of(frames)}
    assert found == {
        ("$", 0, 0, 0.0, end, "default"),
        ("ls", 0, 2, 1.0, end, "default"),
        ("a", 1, 0, 1.0, 3.0, "default"),
        ("b", 1, 1, 1.0, end, "default"),
        ("CD", 1, 2, 1.0, end, "green"),
        ("ef", 1, 4, 2.0, end, "default"),
        ("x", 1, 0, 3.0, end, "default"),
    }


def test_the_picture_has_each_run_at_its_place(recording: Any) -> None:
    frames = [frame(recording, 0.5, "a", "</text>&"), frame(recording, 1.0, "b", "</text>&")]
    picture = ElementTree.fromstring(recording.svg(recording.runs_of(frames), 'A "chat" & more'))
    assert picture.get("aria-label") == 'A "chat" & more'
    texts = {element.text: element for element in picture.iter(f"{SVG}text")}
    assert texts.keys() == {"a", "b", "</text>&"}
    assert texts["a"].get("y") == texts["b"].get("y") != texts["</text>&"].get("y")
    last = [group for group in picture.iter(f"{SVG}g") if "last" in str(group.get("class"))]
    assert {element.text for group in last for element in group} == {"b", "</text>&"}


def test_a_line_waits_for_a_prompt_and_its_other_keys_do_not(recording: Any) -> None:
    keys = list(recording.keys_of(["ls", "é"]))
    assert b"".join(key.code for key in keys) == "ls\ré\r".encode()
    assert [key.begins for key in keys] == [True, False, False, True, False]
