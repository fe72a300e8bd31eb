"""Draws `pilotfish plan --plot`: tokens per second over batch sizes, and speed-up over draft lengths. Imported only to
draw, as it needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from pilotfish.server.cli.bench_plot import GREY
from pilotfish.tools.planner.plan import VANILLA, Plan

WIDTH, HEIGHT = 5.2, 4.0


def plot(plan: Plan, path: Path) -> None:
    """Draw a plan's predictions into a file. Raises OSError, and ValueError for an unknown suffix."""
    batches = list(dict.fromkeys(each.batch for each in plan.predictions))
    drafters = list(dict.fromkeys(each.drafter for each in plan.predictions))
    figure = Figure(figsize=(WIDTH * (1 + len(batches)), HEIGHT), layout="constrained")
    speeds, *panels = figure.subplots(1, 1 + len(batches), squeeze=False)[0]
    for drafter in drafters:
        found = {each.batch for each in plan.predictions if each.drafter == drafter}
        best = [plan.best(drafter, batch) for batch in batches if batch in found]
        style = {"color": GREY, "linestyle": "--"} if drafter == VANILLA else {}
        label = drafter if best[0].acceptance is None else f"{drafter}, acceptance {best[0].acceptance:g}"
        speeds.plot(
            [each.batch for each in best], [each.tokens_per_second for each in best], marker="o", label=label, **style
        )
    speeds.set_xscale("log", base=2)
    speeds.set_yscale("log", base=2)
    for axis in (speeds.xaxis, speeds.yaxis):
        axis.set_major_formatter("{x:g}")
    speeds.set_xlabel("sequences in a step")
    speeds.set_ylabel("tokens per second, best draft length")
    speeds.legend(frameon=False, fontsize=9)
    for panel, batch in zip(panels, batches, strict=True):
        for drafter in drafters:
            own = [each for each in plan.predictions if (each.drafter, each.batch) == (drafter, batch)]
            if drafter != VANILLA:
                panel.plot([p.draft_length for p in own], [p.speedup for p in own], marker="o", label=drafter)
        panel.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
        panel.set_title("1 sequence" if batch == 1 else f"{batch} sequences", fontsize=11)
        panel.set_xlabel("draft length")
        panel.set_ylabel("speed-up over vanilla")
        panel.set_ylim(bottom=0)
    for panel in (speeds, *panels):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{plan.model} on {plan.tensor_parallel_size} x {plan.device}, {plan.context:,} tokens of context")
    figure.savefig(path, dpi=150)
