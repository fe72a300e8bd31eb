"""Draws bench.png: a panel for each target and concurrency, with a bar for each arm. Imported only to draw, as it needs
matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pilotfish.tools.bench.arms import VANILLA
from pilotfish.tools.bench.rows import Row, Summary, summarize

GREY, BLUE, RED = "#8a8f98", "#2f6fb5", "#c2573a"
PANEL_INCHES = (4.2, 3.4)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of all targets into a file: tokens per second, labelled with the speed-up over vanilla."""
    models = list(dict.fromkeys(row.model for row in rows))
    loads = list(dict.fromkeys(row.concurrency for row in rows))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(models), height * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), len(models), squeeze=False)
    for column, model in enumerate(models):
        summaries = summarize([row for row in rows if row.model == model])
        for line, load in enumerate(loads):
            _panel(panels[line][column], model, [each for each in summaries if each.concurrency == load])
            streams = "1 stream" if load == 1 else f"{load} streams"
            panels[line][column].set_title(f"{model}, {streams}", fontsize=11)
    for line in range(len(loads)):
        panels[line][0].set_ylabel("tokens per second")
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, model: str, summaries: Sequence[Summary]) -> None:
    vanilla = next(each for each in summaries if each.arm == VANILLA)
    speeds = [each.tokens_per_second for each in summaries]
    colours = [GREY if each is vanilla else BLUE if each.speedup >= 1 else RED for each in summaries]
    # A draft model named after its target is shown without the target's name.
    names = [each.arm.removeprefix(f"{model}-") for each in summaries]
    bars = axes.bar(names, speeds, color=colours, width=0.6)
    axes.bar_label(bars, [f"{each.speedup:.2f}x" for each in summaries], padding=2)
    axes.axhline(vanilla.tokens_per_second, color="black", linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.15 * max(speeds))
    axes.spines[["top", "right"]].set_visible(False)
    if len(summaries) > 4:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
