"""The page of a report: one HTML file with its plots in it (SVG), which needs nothing else."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pilotfish.tools.selftest.check import Result
from pilotfish.tools.selftest.environment import Environment

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) by the name of their line."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 300, 64, 40, 16
COLORS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e")
STYLE = """
:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0}td,th{padding:.15rem .6rem;text-align:right;
border-bottom:1px solid #8884;vertical-align:top}td:first-child,th:first-child,td.t{text-align:left}
.failed{color:#dc2626;font-weight:600}.warned{color:#d97706;font-weight:600}svg{max-width:100%;height:auto}
svg text{fill:currentColor;font-size:12px}figure{display:inline-block;margin:.5rem 1rem .5rem 0}
figcaption{font-weight:600}.plots{display:flex;flex-wrap:wrap}
"""


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    what: str
    results: Sequence[Result]
    complete: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """Checks of a step whose names match `pattern` become points: its groups are a line's name, and x."""

    step: str
    title: str
    pattern: str
    x: str
    y: str
    value: str = ""
    """One of the check's values instead of its figure."""


PLOTS = (
    Plot("passes", "A decoding pass", r"(\w+): decode, (\d+) streams", "streams", "ms"),
    Plot(
        "passes",
        "The same, until the host has launched it",
        r"(\w+): decode, (\d+) streams",
        "streams",
        "ms",
        "host ms",
    ),
    Plot("passes", "Verifying a draft", r"(\w+): verify (\d+) rows", "rows", "ms"),
    Plot("passes", "Reading a prompt", r"(\w+): prompt of (\d+) tokens", "tokens", "tokens/s", "tokens per second"),
    Plot("serving", "Tokens a second", r"(plain|drafts of .*), (\d+) streams", "streams", "tokens/s"),
    Plot("backends", "Attention of one row, GB/s", r"(.*): decode, (\d+)k?$", "tokens", "GB/s", "GB/s"),
)


def page_of(environment: Environment, version: str, sections: Sequence[Section]) -> str:
    """Return the page's HTML."""
    results = [result for section in sections for result in section.results]
    gpus = "; ".join(f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB" for gpu in environment.gpus)
    machine = gpus or f"{environment.processor}, {environment.cores} cores (no GPU: small models stand in)"
    packages = ", ".join(f"{name} {found}" for name, found in environment.packages.items())
    driver = f", driver {environment.driver}" if environment.driver else ""
    counts = ", ".join(
        f"{count} {verdict}"
        for verdict in ("passed", "warned", "failed", "skipped", "measured")
        if (count := sum(result.verdict == verdict for result in results))
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Pilotfish on {escape(machine)}</title><style>{STYLE}</style>",
        f"<h1>Pilotfish {escape(version)} on {escape(machine)}</h1>",
        f"<p>{escape(environment.kernels)} kernels in {escape(environment.dtype)}; {escape(packages)}{escape(driver)}; "
        f"Python {escape(environment.python)}; {escape(environment.system)}</p><p>{counts}</p>",
        _table([result for result in results if result.verdict in ("failed", "warned")]),
    ]
    for section in sections:
        cut = "" if section.complete else " (cut off)"
        parts.append(f"<h2>{escape(section.name)}{cut}</h2><p>{escape(section.what)}</p><div class=plots>")
        parts += [_plot(plot, section.results) for plot in PLOTS if plot.step == section.name]
        parts += ["</div>", _table(section.results)]
    return "\n".join(parts) + "\n"


def _table(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = []
    for result in results:
        values = "; ".join(f"{name} {_number(value)}" for name, value in result.values.items())
        words = "; ".join(filter(None, (result.detail, values)))
        sign = "&ge;" if result.at_least else "&le;"
        bound = "" if result.bound is None else f"{sign} {_number(result.bound)}"
        measured = "" if result.measured is None else _number(result.measured)
        rows.append(
            f"<tr><td>{escape(result.name)}<td class='t {result.verdict}'>{result.verdict}<td>{measured}"
            f"<td class=t>{escape(result.unit)}<td>{bound}<td class=t>{escape(words)}"
        )
    head = "<tr><th>check<th>verdict<th>measured<th>unit<th>bound<th>more"
    return f"<table>{head}{''.join(rows)}</table>"


def _plot(plot: Plot, results: Sequence[Result]) -> str:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        found = re.fullmatch(plot.pattern, result.name)
        value = result.values.get(plot.value) if plot.value else result.measured
        if found and value is not None and math.isfinite(value):
            scale = 1024 if result.name.endswith("k") else 1
            series[found[1]].append((float(found[2]) * scale, value))
    lines = {name: sorted(points) for name, points in series.items() if len(points) > 1}
    return f"<figure><figcaption>{escape(plot.title)}</figcaption>{lines_of(lines, plot)}</figure>" if lines else ""


def lines_of(series: Series, plot: Plot) -> str:
    """Return an SVG of lines, x in powers of two, y from 0."""
    points = [point for line in series.values() for point in line]
    low, high = (math.log2(bound(x for x, _ in points)) for bound in (min, max))
    most = max(y for _, y in points) or 1.0

    def at(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - 10) * ((math.log2(x) - low) / ((high - low) or 1))
        return f"{right:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / most):.1f}"

    label = escape(f"{plot.title}: {plot.y} by {plot.x}")
    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT + 18 * len(series)}' width={WIDTH} role=img aria-label='{label}'>"]
    for i in range(5):
        y = most * i / 4
        top = at(2**low, y).split(",")[1]
        parts.append(f"<path d='M{LEFT},{top}H{WIDTH - 10}' stroke='#8885'/>")
        parts.append(f"<text x={LEFT - 6} y={top} text-anchor=end dy=4>{_number(y)}</text>")
    for x in sorted({x for x, _ in points}):
        left = at(x, 0).split(",")[0]
        parts.append(f"<text x={left} y={HEIGHT - BOTTOM + 16} text-anchor=middle>{x:.0f}</text>")
    parts.append(f"<text x={(WIDTH + LEFT) // 2} y={HEIGHT - 6} text-anchor=middle>{escape(plot.x)}</text>")
    for i, (name, line) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        places = [at(x, y) for x, y in line]
        parts.append(f"<polyline points='{' '.join(places)}' fill=none stroke='{color}' stroke-width=2 />")
        parts += [f"<circle cx={a} cy={b} r=3 fill='{color}'/>" for a, b in (place.split(",") for place in places)]
        below = HEIGHT + 18 * i + 10
        parts.append(f"<rect x={LEFT} y={below - 9} width=12 height=10 fill='{color}'/>")
        parts.append(f"<text x={LEFT + 18} y={below}>{escape(name)}, {escape(plot.y)}</text>")
    return "".join(parts) + "</svg>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
