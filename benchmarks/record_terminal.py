"""Records a chat in a terminal as an animated SVG: the README's.

    pilotfish serve --model smollm2-135m
    pip install pyte
    python benchmarks/record_terminal.py --out docs/images/terminal.svg

A shell runs in a terminal of its own (`pyte` says what is on its screen), and the keys of --type are pressed, one after
the other; a line waits for the prompt. The picture shows what was on the screen, at the time at which it was. It needs
nothing else, and is a few tens of kilobytes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pty
import select
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS, CHARACTER, LINE, MARGIN = 84, 7.8, 18.0, 14.0
KEY_SECONDS, PROMPT_SECONDS, PAUSE = 0.045, 0.8, 3.0
"""Between keys; for which a prompt is looked at before the next line; for which the end is shown."""
PROMPTS = ("$", ">")
FRAME_SECONDS = 1 / 30
TYPED = (
    "pilotfish chat --colours --temperature 0 --max-tokens 110",
    "Write a Python class for a stack with push, pop and peek.",
    "/settings",
    "/exit",
)
COLOURS = {
    "default": "#e4e8ec", "black": "#39414a", "red": "#ff8a80", "green": "#8fd694", "brown": "#f0c674",
    "blue": "#8ab4f8", "magenta": "#d7a6f2", "cyan": "#7fd8e0", "white": "#e4e8ec", "brightred": "#ff8a80",
    "brightblack": "#8b96a1",
}  # fmt: skip


class Cell(NamedTuple):
    text: str
    colour: str
    bold: bool


class Run(NamedTuple):
    """A piece of a line, and when it was on the screen: from `since` until before `until`, in seconds."""

    since: float
    until: float
    row: int
    column: int
    text: str
    colour: str
    bold: bool


Screen = dict[tuple[int, int], Cell]
"""By row and column; without the cells that are empty."""


@dataclass(frozen=True, slots=True)
class Frame:
    at: float
    screen: Screen


def record(command: Sequence[str], typed: Sequence[str], rows: int, seconds: float) -> Iterator[Frame]:
    """Run a command in a terminal, press the keys of each line of `typed`, and yield its screens. Ends after `seconds`
    at the latest."""
    emulator = importlib.import_module("pyte")
    screen = emulator.Screen(COLUMNS, rows)
    stream = emulator.ByteStream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        own = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(rows), "PS1": "$ ", "NO_COLOR": ""}
        os.execvpe(command[0], list(command), {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **own})
    keys = keys_of(typed)
    began = heard = drawn = time.monotonic()
    pressed = began
    key = next(keys)
    try:
        while (now := time.monotonic()) - began < seconds:
            if select.select([terminal], [], [], 0.01)[0]:
                try:
                    data = os.read(terminal, 1 << 16)
                except OSError:  # the shell has ended
                    break
                stream.feed(data)
                answers = screen_reports(data, screen)
                if answers:
                    os.write(terminal, answers)
                heard = now
            if now - drawn >= FRAME_SECONDS:
                yield Frame(now - began, cells(screen))
                drawn = now
            if key.begins and not (asks(screen) and now - heard >= PROMPT_SECONDS):
                continue
            if now - pressed >= KEY_SECONDS:
                os.write(terminal, key.code)
                pressed = now
                try:
                    key = next(keys)
                except StopIteration:
                    break
        yield Frame(time.monotonic() - began, cells(screen))
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


class Key(NamedTuple):
    code: bytes
    begins: bool
    """Whether it is the first of its line, which waits for a prompt."""


def keys_of(typed: Iterable[str]) -> Iterator[Key]:
    for line in typed:
        for i, character in enumerate(f"{line}\r"):
            yield Key(character.encode(), i == 0)


def asks(screen: Any) -> bool:
    """Whether the cursor is behind a prompt, with nothing else in its line."""
    line: str = screen.display[screen.cursor.y]
    return line.strip() in PROMPTS


def screen_reports(data: bytes, screen: Any) -> bytes:
    """Return what a terminal answers to a program that asks where the cursor is."""
    if b"\x1b[6n" not in data:
        return b""
    return f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R".encode()


def cells(screen: Any) -> Screen:
    return {
        (row, column): Cell(cell.data, "brightblack" if getattr(cell, "dim", False) else cell.fg, cell.bold)
        for row, line in screen.buffer.items()
        for column, cell in line.items()
        if cell.data.strip()
    }


def runs_of(frames: Sequence[Frame]) -> list[Run]:
    """Return what was on the screen: neighbours of one style that came and went together are one run."""
    end = frames[-1].at + PAUSE
    shown: dict[tuple[int, int], tuple[Cell, float]] = {}
    found: list[tuple[float, float, Cell, int, int]] = []
    for frame in frames:
        for place, (cell, since) in list(shown.items()):
            if frame.screen.get(place) != cell:
                found.append((since, frame.at, cell, *place))
                del shown[place]
        for place, cell in frame.screen.items():
            shown.setdefault(place, (cell, frame.at))
    found += [(since, end, cell, *place) for place, (cell, since) in shown.items()]
    found.sort(key=lambda each: (each[0], each[1], each[3], each[4]))
    runs = []
    for _, group in groupby(enumerate(found), _of_one_run):
        pieces = [piece for _, piece in group]
        since, until, cell, row, column = pieces[0]
        runs.append(Run(since, until, row, column, "".join(piece[2].text for piece in pieces), cell.colour, cell.bold))
    return runs


def _of_one_run(numbered: tuple[int, tuple[float, float, Cell, int, int]]) -> tuple[Any, ...]:
    i, (since, until, cell, row, column) = numbered
    return since, until, row, cell.colour, cell.bold, column - i


def svg(runs: Sequence[Run], label: str) -> str:
    """Return the picture."""
    total = max(run.until for run in runs)
    rows = 1 + max(run.row for run in runs)
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, 2 * MARGIN + rows * LINE
    spans = sorted({(run.since, run.until) for run in runs})
    names = {span: f"t{i}" for i, span in enumerate(spans)}
    style = [
        "text{font:13px ui-monospace,Menlo,Consolas,monospace;white-space:pre}.b{font-weight:bold}",
        *(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items()),
        "@media (prefers-reduced-motion:reduce){g{animation:none!important}g.last{opacity:1!important}}",
    ]
    for (since, until), name in names.items():
        on, off = 100 * since / total, 100 * until / total
        stays = until >= total
        last = "" if stays else f"{off:.2f}%,100%{{opacity:0}}"
        style.append(
            f"@keyframes {name}{{0%,{max(on - 0.01, 0):.2f}%{{opacity:0}}"
            f"{on:.2f}%,{100 if stays else off - 0.01:.2f}%{{opacity:1}}{last}}}"
            f".{name}{{opacity:0;animation:{name} {total:.2f}s linear infinite}}"
        )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">',
        f"<style>{''.join(style)}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#15181c"/>',
    ]
    for span, group in groupby(sorted(runs), lambda run: run[:2]):
        out.append(f'<g class="{names[span]}{" last" if span[1] >= total else ""}">')
        for run in group:
            x, y = MARGIN + run.column * CHARACTER, MARGIN + (run.row + 0.75) * LINE
            kind = f"{run.colour if run.colour in COLOURS else 'default'}{' b' if run.bold else ''}"
            length = f'textLength="{len(run.text) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
            out.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {length}>{escape(run.text)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", action="append", help="a line to type; several may be given")
    parser.add_argument("--rows", type=int, default=26)
    parser.add_argument("--seconds", type=float, default=90, help="after which the recording ends at the latest")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("needs Linux's terminals")
    frames = list(record(["bash", "--norc", "--noprofile"], args.type or TYPED, args.rows, args.seconds))
    picture = svg(runs_of(frames), "A chat in the terminal")
    args.out.write_text(picture)
    print(f"{len(frames)} screens, {frames[-1].at:.0f} s, {len(picture) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
