"""Reads what is in docker/, for the tests beside this file: dashboards' panels, Prometheus' rules, YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
GRAFANA = DOCKER / "grafana"
PROMETHEUS = DOCKER / "prometheus"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))

COMPARISON = re.compile(r"\s*(==|!=|>=|<=|>|<)\s*(?:bool\s+)?-?[\d.]+(?:e[+-]?\d+)?(?![\w.])")


@dataclass(frozen=True)
class PanelQuery:
    """A query of a dashboard's panel, as Grafana would send it but for its variables."""

    board: str
    panel: dict[str, Any]
    expression: str
    legend: str
    instant: bool

    @property
    def name(self) -> str:
        return f"{self.board}: {self.panel['title']}: {self.legend}"


@dataclass(frozen=True)
class Rule:
    """A recording rule or an alert."""

    name: str
    expression: str
    alert: bool


def documents(path: Path) -> list[Any]:
    """Of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def panels(path: Path) -> list[dict[str, Any]]:
    """Of a dashboard's file, without the rows' headings."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def panel_queries() -> list[PanelQuery]:
    return [
        PanelQuery(path.stem, panel, target["expr"], target["legendFormat"], target.get("instant", False))
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]


def rules() -> list[Rule]:
    return [
        Rule(rule.get("alert") or rule["record"], rule["expr"], "alert" in rule)
        for path in RULE_FILES
        for group in documents(path)[0]["groups"]
        for rule in group["rules"]
    ]


def without_comparisons(expression: str) -> str:
    """An alert's expression as a value that is there whether it fires or not."""
    return COMPARISON.sub("", expression)
