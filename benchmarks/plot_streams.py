"""Draws how speed grows with the number of streams: the README's picture, from results of `pilotfish bench`.

    python benchmarks/plot_streams.py benchmarks/results/bench.json benchmarks/results/bench-streams.json \
        --out docs/images/streams.svg

A panel for each target: tokens per second of all streams together, plain and with the controller, means over suites and
rounds, and how much the controller gains, as the tables have it: the geometric mean over suites.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

PLAIN, CONTROLLED = "vanilla", "auto"
COLOURS = {PLAIN: "#8a8f98", CONTROLLED: "#2f6fb5"}
NAMES = {PLAIN: "plain decoding", CONTROLLED: "with drafts, auto"}

Curve = Mapping[int, tuple[float, float]]
"""Tokens per second, and their ratio to plain decoding, by streams."""


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return the curves of each target's two arms from the rows of results, for the loads at which there are both."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["arm"] in COLOURS:
            found[row["model"]][row["arm"]][row["concurrency"]].append((row["tokens_per_second"], row["speedup"]))
    return {
        model: {
            arm: {
                load: (
                    fmean(speed for speed, _ in arms[arm][load]),
                    geometric_mean(gain for _, gain in arms[arm][load]),
                )
                for load in sorted(arms[PLAIN].keys() & arms[CONTROLLED].keys())
            }
            for arm in (PLAIN, CONTROLLED)
        }
        for model, arms in found.items()
    }


def draw(targets: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw the curves into a file."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "streams"  # the same input, the same file
    figure = Figure(figsize=(4.4 * len(targets), 3.3), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    for axes, (model, arms) in zip(panels, targets.items(), strict=True):
        for arm, curve in arms.items():
            axes.plot(list(curve), [speed for speed, _ in curve.values()], "o-", color=COLOURS[arm], label=NAMES[arm])
        for load, (speed, gain) in arms[CONTROLLED].items():
            axes.annotate(f"{gain:.2f}×", (load, speed), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_title(model, fontsize=11)
        axes.set_xlabel("streams")
        axes.set_xticks(list(arms[PLAIN]))
        axes.set_xlim(-0.5, max(arms[PLAIN]) + 1)
        axes.set_ylim(0, 1.15 * max(speed for curve in arms.values() for speed, _ in curve.values()))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens per second, all together")
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that pilotfish bench has written")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    targets = curves(row for path in args.results for row in json.loads(path.read_text())["rows"])
    draw(targets, args.out)
    for model, arms in targets.items():
        gains = ", ".join(f"{load}: {gain:.2f}" for load, (_, gain) in arms[CONTROLLED].items())
        print(f"{model}: {gains}")


if __name__ == "__main__":
    main()
