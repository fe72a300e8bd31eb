"""The recording of a race: tokens at their times and places, and nothing in the picture that a text could turn into
markup."""

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
    return importlib.import_module("record_race")


def lane(recording: Any, arm: str, rate: float) -> Any:
    tokens = ["if", " a", " <", " b", " &&", " c", ":\n", "    ", "return", " </text>", *[" word"] * 30]
    drafters = [None, "ngram", None, "suffix"] * 10 if arm != "off" else [None] * 40
    return recording.Lane(arm, [(0.1 * i, token, drafters[i]) for i, token in enumerate(tokens)], rate)


def test_text_is_broken_between_tokens_and_at_line_breaks(recording: Any) -> None:
    pieces = recording.placed(lane(recording, "off", 1.0))
    assert all(column + len(text) <= recording.COLUMNS for _, _, column, text, _ in pieces)
    lines = [line for _, line, *_ in pieces]
    assert lines == sorted(lines)
    assert [text for _, line, _, text, _ in pieces if line == 0] == ["if", " a", " <", " b", " &&", " c", ":"]


def test_the_picture_is_one_and_says_what_was_measured(recording: Any) -> None:
    lanes = [lane(recording, "off", 40.0), lane(recording, "auto", 60.0)]
    picture = ElementTree.fromstring(recording.svg(lanes, "a < b?", "tiny & small"))
    texts = [text for element in picture.iter(f"{SVG}text") if (text := "".join(element.itertext()))]
    assert "tiny & small: a < b?" in texts
    assert {"40 tokens/s", "60 tokens/s, 1.50×", "✓ the same text", "ngram", "suffix"} <= set(texts)
    assert texts.count(" </text>") == 2
    filled = [element.get("fill") for element in picture.iter(f"{SVG}rect")]
    assert filled.count("#1d4f80") == 10 + 1  # tokens, and the legend
