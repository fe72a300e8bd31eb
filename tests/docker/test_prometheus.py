"""Prometheus' configuration and rules, by promtool; that each rule is covered by a unit test of promtool's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.support.deployment import PROMETHEUS, RULE_FILES, documents, rules, without_comparisons

pytestmark = pytest.mark.docker

UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


@pytest.fixture
def promtool(tool: Callable[..., str]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        command = [tool("promtool", "prometheus"), *map(str, arguments)]
        done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_configuration(promtool: Callable[..., None]) -> None:
    promtool("check", "config", "prometheus.yml")


def test_rules(promtool: Callable[..., None]) -> None:
    promtool("check", "rules", *RULE_FILES)


def test_unit_tests(promtool: Callable[..., None]) -> None:
    promtool("test", "rules", *UNIT_TESTS)


def test_every_rule_has_a_unit_test() -> None:
    tests = [test for path in UNIT_TESTS for test in documents(path)[0]["tests"]]
    expressions = [case["expr"] for test in tests for case in test.get("promql_expr_test", ()) if case["exp_samples"]]
    firing = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case.get("exp_alerts")}
    silent = {
        case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if not case.get("exp_alerts")
    }
    assert rules()
    for rule in rules():
        if rule.alert:
            assert rule.name in firing & silent, f"{rule.name} is not seen to fire, and not to fire"
        else:
            assert any(rule.name in expression for expression in expressions), rule.name


def test_comparisons_are_taken_away() -> None:
    assert without_comparisons('min_over_time(a{b="c"}[5m]) > 0 and deriv(d[10m]) <= 0.5') == (
        'min_over_time(a{b="c"}[5m]) and deriv(d[10m])'
    )
