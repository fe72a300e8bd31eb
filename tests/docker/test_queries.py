"""Every query of the dashboards, every recording rule and every alert against a real Prometheus that scrapes a real
server of SmolLM2 under load: each brings data, of the right shape.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.support.deployment import PanelQuery, Rule, panel_queries, rules, without_comparisons
from tests.support.running_prometheus import RunningPrometheus
from tests.support.running_server import RunningServer

pytestmark = [pytest.mark.docker, pytest.mark.process, pytest.mark.real_model]

MODEL = "smollm2-135m"
TOKENS = 64
TEXT = "the cat sat on the mat, and the dog sat on the log, and "
"""Repeats itself, so that every drafter has something to draft from."""
START_SECONDS = 240
LOAD_SECONDS = 120
WINDOW = "20s"
"""What stands for $__rate_interval."""
RANGE_SECONDS = 60
"""And for $__range, at most."""

DRAFTERS: tuple[dict[str, Any], ...] = ({}, {"speculation": "ngram"}, {"speculation": "suffix"}, {"speculation": "off"})


def stream(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    chunks = client.completions.create(
        model=MODEL, prompt=TEXT * 4, max_tokens=TOKENS, temperature=0, stream=True, extra_body=extra
    )
    assert sum(len(chunk.choices) for chunk in chunks) > 1


def abort(client: openai.OpenAI) -> None:
    """Goes away after the first text."""
    with client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1000, stream=True) as chunks:
        next(iter(chunks))


def put_under_load(client: openai.OpenAI) -> None:
    """Some seconds of it: 16 streams and one request with a prediction, 6 at a time; one abort, one refusal."""
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=TEXT, temperature=9)
    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(stream, client, extra) for extra in DRAFTERS * 4]
        work.append(pool.submit(stream, client, {"prediction": {"type": "content", "content": TEXT * 3}}))
        work.append(pool.submit(abort, client))
        for each in work:
            each.result(LOAD_SECONDS)


@pytest.fixture(scope="module")
def monitored(
    tool: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningPrometheus, float, float]]:
    """Prometheus, and the times between which it has seen the load (seconds since 1970)."""
    program = tool("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("monitored")
    # Without a memory, which would know the predicted text from the other requests, too.
    flags = ("--max-num-seqs", "4", "--kv-cache-memory", "128MiB", "--suffix-memory", "0")
    server = RunningServer(folder / "server.log", "--model", MODEL, *flags)
    prometheus = None
    try:
        server.wait_until(lambda: server.status("/ready") == 200, START_SECONDS)
        begin = time.time()
        prometheus = RunningPrometheus(program, folder, server.url.removeprefix("http://"))
        prometheus.wait_for_scrapes(2)
        with server.client() as client:
            for _ in range(2):  # rates need two scrapes with something between them, also for what ends late
                put_under_load(client)
                prometheus.wait_for_scrapes(2)
        yield prometheus, begin, time.time()
    finally:
        if prometheus is not None:
            prometheus.stop()
        server.stop()


def filled_in(expression: str) -> str:
    """With values for Grafana's variables."""
    expression = expression.replace("$__rate_interval", WINDOW).replace("$__range", f"{RANGE_SECONDS}s")
    expression = expression.replace("$instance", ".*")
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.name)
def test_panel_has_data(query: PanelQuery, monitored: tuple[RunningPrometheus, float, float]) -> None:
    prometheus, begin, end = monitored
    expression = filled_in(query.expression)
    found = prometheus.instant(expression) if query.instant else prometheus.range(expression, begin, end)
    assert [series for series in found if series.numbers], f"no data: {expression}"
    defaults = query.panel["fieldConfig"]["defaults"]
    numbers = [number for series in found for number in series.numbers]
    assert min(numbers) >= defaults.get("min", -float("inf"))
    assert max(numbers) <= defaults.get("max", float("inf")) + 1e-9
    legend_labels = re.findall(r"\{\{(\w+)\}\}", query.legend)
    shown = {tuple(series.labels.get(label) for label in legend_labels) for series in found}
    assert all(all(values) for values in shown), f"a label of {query.legend!r} is missing: {shown}"
    assert len(shown) == len(found), f"{query.legend!r} does not tell {len(found)} series apart"


def test_panels_show_what_the_load_was(monitored: tuple[RunningPrometheus, float, float]) -> None:
    """The labels by which lines are told apart have the values that this load had to make."""
    prometheus, begin, end = monitored
    by_title = {query.panel["title"]: query for query in panel_queries()}

    def lines(title: str) -> set[str]:
        """Those with more than zeros."""
        query = by_title[title]
        (label,) = re.findall(r"\{\{(\w+)\}\}", query.legend)
        found = prometheus.range(filled_in(query.expression), begin, end)
        return {series.labels[label] for series in found if max(series.numbers, default=0) > 0}

    assert {"length", "abort", "refused"} <= lines("Answers by outcome")
    assert {"200", "400"} <= lines("HTTP responses by status")
    assert {"ngram", "suffix", "prediction"} <= lines("Drafted tokens")
    assert {"1", "2", "3"} <= lines("Acceptance by position")
    assert {"plan", "forward", "sample", "commit"} <= lines("A step's time")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_rule_has_data(rule: Rule, monitored: tuple[RunningPrometheus, float, float]) -> None:
    """A recording rule has made its series; an alert's expression is there but for its comparisons."""
    prometheus, *_ = monitored
    (loaded,) = (loaded for loaded in prometheus.rules() if loaded["name"] == rule.name)
    assert loaded["health"] == "ok", loaded.get("lastError")
    expression = without_comparisons(rule.expression) if rule.alert else rule.name
    found = prometheus.instant(expression)
    assert [series for series in found if series.numbers], f"no data: {expression}"
    for series in found:
        assert series.labels.get("job") == "pilotfish"
        assert series.labels.get("instance")
        if ":ratio" in rule.name or rule.name.endswith("_ratio"):
            assert all(number >= 0 for number in series.numbers)


def test_no_alert_fires_of_a_healthy_server(monitored: tuple[RunningPrometheus, float, float]) -> None:
    prometheus, *_ = monitored
    assert prometheus.instant('ALERTS{alertstate="firing"}') == []


def test_the_variable_of_servers_has_values(monitored: tuple[RunningPrometheus, float, float]) -> None:
    """label_values(pilotfish_engine_info, instance), by which the dashboards offer the servers."""
    prometheus, *_ = monitored
    (series,) = prometheus.instant("pilotfish_engine_info")
    assert series.labels["instance"].startswith("127.0.0.1:")
