"""What a panel of the dashboards is, and how it becomes Grafana's: by grafana-foundation-sdk, which knows Grafana's
schema. The panels themselves are in service.py and speculation.py.

Every panel has a title, a description, a unit, and a text for when there is nothing to show. Queries say `$i` for the
label matcher of the servers that the reader has selected.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.models import common, dashboard

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
INSTANCES = 'instance=~"$instance"'
"""What `$i` stands for."""

Kind = Literal["lines", "stacked", "number"]
Steps = tuple[tuple[float | None, str], ...]
"""Colours from values on; the first has None, for everything below."""


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` may have labels, as in `{{drafter}}`."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is one of Grafana's names for units; a row is 24 wide. `steps` colours a number, or draws lines at
    limits."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    empty: str
    kind: Kind = "lines"
    width: int = 8
    height: int = 8
    decimals: int | None = None
    minimum: float | None = 0.0
    maximum: float | None = None
    steps: Steps = ()
    colours: dict[str, str] = field(default_factory=dict)
    """Of series, by their legends."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


def render(board: Board) -> dashboard.Dashboard:
    """As Grafana's dashboard."""
    made = (
        builder.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["pilotfish"])
        .readonly()
        .time("now-1h", "now")
        .timezone("browser")
        .refresh("10s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            builder.DashboardLink("Pilotfish")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["pilotfish"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            builder.QueryVariable("instance")
            .label("Replica")
            .datasource(SOURCE)
            .query("label_values(pilotfish_engine_info, instance)")
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(dashboard.VariableOption(text="All", value="$__all", selected=True))
        )
    )
    ids = itertools.count(1)
    for row in board.rows:
        made = made.with_row(builder.Row(row.title).id(next(ids)))
        for panel in row.panels:
            made = made.with_panel((_number(panel) if panel.kind == "number" else _lines(panel)).id(next(ids)))
    return made.build()


def _common(made: stat.Panel | timeseries.Panel, panel: Panel) -> None:
    made.title(panel.title).description(panel.description).unit(panel.unit).no_value(panel.empty)
    made.datasource(SOURCE).span(panel.width).height(panel.height)
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    if panel.minimum is not None:
        made.min(panel.minimum)
    if panel.maximum is not None:
        made.max(panel.maximum)
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expression.replace("$i", INSTANCES)).legend_format(query.legend)
        made.with_target(
            (target.instant() if panel.kind == "number" else target.range()).ref_id(chr(ord("A") + number))
        )
    if panel.steps:
        steps = [dashboard.Threshold(value, colour) for value, colour in panel.steps]
        made.thresholds(builder.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
    for legend, colour in panel.colours.items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        made.override_by_name(legend, [dashboard.DynamicConfigValue(id_val="color", value=fixed)])


def _number(panel: Panel) -> stat.Panel:
    made = stat.Panel()
    _common(made, panel)
    # A rate over nothing is no number; without this, Grafana would show it as "NaN".
    nothing = dashboard.ValueMappingResult(text=panel.empty, color="text")
    made.mappings(
        [
            dashboard.SpecialValueMap(
                options=dashboard.DashboardSpecialValueMapOptions(
                    match=dashboard.SpecialValueMatch.NULL_AND_NAN, result=nothing
                )
            )
        ]
    )
    made.graph_mode(common.BigValueGraphMode.NONE)
    made.color_mode(common.BigValueColorMode.VALUE)
    made.text_mode(common.BigValueTextMode.VALUE if len(panel.queries) == 1 else common.BigValueTextMode.VALUE_AND_NAME)
    return made.reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))


def _lines(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel()
    _common(made, panel)
    made.line_width(1).fill_opacity(8).show_points(common.VisibilityMode.NEVER)
    if panel.kind == "stacked":
        made.fill_opacity(40).stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if panel.steps:
        style = common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        made.thresholds_style(style)
    legend = common_builder.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST)
    made.legend(legend.placement(common.LegendPlacement.BOTTOM))
    tooltip = common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    return made.tooltip(tooltip.sort(common.SortOrder.DESCENDING))
