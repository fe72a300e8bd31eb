"""The dashboards: that they are what their sources make, and that every panel says what it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.deployment import DASHBOARDS, GRAFANA, PROMETHEUS, ROOT, documents, panel_queries, panels, rules

pytestmark = pytest.mark.docker

each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def metric_names(expression: str) -> set[str]:
    """The names of Pilotfish's own metrics in a query; not those of recording rules, which have colons."""
    return set(re.findall(r"(?<![:\w])pilotfish_\w+(?![:\w])", expression))


def documented_metrics() -> set[str]:
    """All names that docs/metrics.md has, and those of the series that a histogram has."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if match := re.match(r"\| `(pilotfish_\w+)` \| (\w+) \|", line):
            name, kind = match.groups()
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


def test_the_files_are_what_the_sources_make(dashboard_builder: ModuleType) -> None:
    made = {name: dashboard_builder.content(board) for name, board in dashboard_builder.BOARDS.items()}
    assert {path.name: path.read_text() for path in DASHBOARDS} == made, "run python docker/grafana/build.py"


@each_dashboard
def test_grafanas_own_models_read_them(path: Path, package: Callable[[str], ModuleType]) -> None:
    models, encoder = package("grafana_foundation_sdk.models.dashboard"), package("grafana_foundation_sdk.cog.encoder")
    content = json.loads(path.read_text())
    read = models.Dashboard.from_json(content)
    assert json.loads(json.dumps(read, cls=encoder.JSONEncoder)) == content  # nothing that they do not know


@each_dashboard
def test_every_panel_says_what_it_shows(path: Path) -> None:
    titles = [panel["title"] for panel in panels(path)]
    assert titles
    assert len(set(titles)) == len(titles)
    for panel in panels(path):
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 20, panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["noValue"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        if panel["type"] == "stat":  # a rate over nothing is NaN, for which noValue does not stand
            (mapping,) = defaults["mappings"]
            assert mapping["options"] == {
                "match": "null+nan",
                "result": {"text": defaults["noValue"], "color": "text"},
            }


@each_dashboard
def test_panels_do_not_overlap(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(path.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


def test_queries_are_of_the_selected_servers_and_known_metrics() -> None:
    known = documented_metrics()
    for query in panel_queries():
        selectors = re.findall(r"\w+\{[^}]*\}", query.expression)
        assert selectors, query.name
        assert all('instance=~"$instance"' in selector for selector in selectors), query.name
        assert metric_names(query.expression) <= known, query.name
    for rule in rules():
        assert metric_names(rule.expression) <= known, rule.name


def test_provisioning_fits_together() -> None:
    (source,) = documents(GRAFANA / "provisioning" / "datasources" / "prometheus.yaml")
    (prometheus,) = documents(PROMETHEUS / "prometheus.yml")
    (datasource,) = source["datasources"]
    assert datasource["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    variables: dict[str, Any] = {
        variable["name"]: variable for variable in json.loads(DASHBOARDS[0].read_text())["templating"]["list"]
    }
    assert variables["datasource"]["query"] == datasource["type"]
