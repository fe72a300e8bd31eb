"""The report of `benchmarks/soak.py`: text, JSON and plots."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from soak_load import Seen

LEAST_SAMPLES = 600
"""Seconds of one process, from which a slope of its memory says something."""


class Sample(NamedTuple):
    """Memory in bytes, at a time in seconds since the start."""

    seconds: float
    engine_pid: int
    server: int
    engine: int
    descriptors: int


@dataclass
class Report:
    seen: Seen
    seconds: float
    clients: int
    faults: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, when, seconds from its end until a request was answered)."""
    samples: list[Sample] = field(default_factory=list)
    hanging: int = 0
    """Clients that still waited three minutes after the end."""
    same_after: bool = False
    """Whether the server gives the same texts at the end as before."""
    left: dict[str, float] = field(default_factory=dict)
    restarts: float = 0.0
    replayed: float = 0.0
    healthy: bool = False

    @property
    def right(self) -> bool:
        """Whether all that was promised was kept."""
        outcomes, left = self.seen.outcomes, self.left
        leaked = left["kv_blocks_used"] + left["sequences_running"] + left["sequences_waiting"]
        lost = outcomes["without an end"] + self.hanging + self.seen.sent - outcomes.total()
        return not (lost or outcomes["wrong"] or leaked) and self.same_after and self.healthy

    def slope(self, what: str, warm_up: float) -> float | None:
        """MB per hour, from the end of the warm-up on, of the engine process that was there longest."""
        samples = [sample for sample in self.samples if sample.seconds >= warm_up * self.seconds]
        if what == "engine" and samples:
            pid = statistics.mode(sample.engine_pid for sample in samples)
            samples = [sample for sample in samples if sample.engine_pid == pid]
        if len(samples) < LEAST_SAMPLES:
            return None
        values = [getattr(sample, what) / 1e6 for sample in samples]
        return float(np.polyfit([sample.seconds / 3600 for sample in samples], values, 1)[0])

    def text(self, command: str, warm_up: float) -> str:
        """Return the report in Markdown."""
        seen, lines = self.seen, ["# Soak", "", f"    {command}", ""]
        lines += ["| | |", "|---|---|"]
        lines.append(f"| requests sent, by {self.clients} clients in {self.seconds:.0f} s | {seen.sent} |")
        lines += [f"| {name} | {count} |" for name, count in sorted(seen.outcomes.items())]
        lines.append(f"| without an end | {seen.outcomes['without an end'] + self.hanging} |")
        lines.append(f"| texts compared, wrong | {seen.checked}, {seen.outcomes['wrong']} |")
        lines.append(f"| the same texts at the end | {'yes' if self.same_after else 'no'} |")
        lines += [f"| left at the end: {name.replace('_', ' ')} | {value:.0f} |" for name, value in self.left.items()]
        lines.append(
            f"| restarts of the engine, requests sent to the next | {self.restarts:.0f}, {self.replayed:.0f} |"
        )
        for what in ("server", "engine"):
            slope = self.slope(what, warm_up)
            shown = "too few samples" if slope is None else f"{slope:.1f} MB/h"
            lines.append(f"| memory of the {what}, slope | {shown} |")
        for name, values in (("TTFT", seen.first), ("ITL", seen.between)):
            if values:
                p50, p99 = (1000 * float(np.percentile([value for _, value in values], q)) for q in (50, 99))
                lines.append(f"| {name} of streams, p50 and p99 | {p50:.0f} ms, {p99:.0f} ms |")
        if seen.retries:
            lines += ["", "Attempts that clients repeated:", "", "| | |", "|---|---|"]
            lines += [f"| {what} | {count} |" for what, count in seen.retries.most_common()]
        if self.faults:
            by_name = defaultdict[str, list[float]](list)
            for name, _, seconds in self.faults:
                by_name[name].append(seconds)
            lines += ["", "| fault | times | seconds until a request is answered: median, most |", "|---|---|---|"]
            for name, took in by_name.items():
                lines.append(f"| {name} | {len(took)} | {statistics.median(took):.2f}, {max(took):.2f} |")
        lines += ["", *(f"- {wrong}" for wrong in seen.wrong[:20])]
        return "\n".join(lines).rstrip() + "\n"


def write(report: Report, text: str, folder: Path) -> None:
    """Write README.md, report.json and soak.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot(report, folder / "soak.png")
    (folder / "README.md").write_text(f"{text}\n![Memory, TTFT and ITL over time](soak.png)\n")
    seen = report.seen
    data = {
        "right": report.right, "seconds": report.seconds, "clients": report.clients, "sent": seen.sent,
        "outcomes": dict(seen.outcomes), "kinds": dict(seen.kinds), "retries": dict(seen.retries),
        "checked": seen.checked, "wrong": seen.wrong, "left": report.left, "faults": report.faults,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")


def _plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, first, between) = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    times = [sample.seconds for sample in report.samples]
    memory.plot(times, [sample.server / 2**20 for sample in report.samples], label="server")
    memory.plot(times, [sample.engine / 2**20 for sample in report.samples], label="engine")
    memory.set_ylabel("memory, MiB")
    memory.legend()
    for axes, values, name in ((first, report.seen.first, "TTFT, ms"), (between, report.seen.between, "ITL, ms")):
        axes.plot([when for when, _ in values], [1000 * value for _, value in values], ".", markersize=2)
        axes.set_yscale("log")
        axes.set_ylabel(name)
    for axes in (memory, first, between):
        for _, when, _ in report.faults:
            axes.axvline(when, color="grey", linewidth=0.5)
    between.set_xlabel("seconds; lines are faults")
    figure.savefig(path, dpi=90)
