"""The schemas of benchmarks/schemas: all compile, and SmolLM2's answers keep to them with every kind of speculation."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from pilotfish.text.grammar.output_format import OutputFormat, build
from tests.support.grammars import byte_tokenizer
from tests.support.paths import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("structured_output")

TASKS = benchmark.read_tasks()


def test_there_are_fifty_and_ten_are_our_own() -> None:
    assert len(TASKS) == 50
    assert sum(task.origin is None for task in TASKS) == 10


def test_the_readme_says_where_each_comes_from() -> None:
    listed = {}
    for line in (benchmark.SCHEMAS / "README.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| package"):
            package, _, _, names = (cell.strip() for cell in line.strip("|").split("|"))
            listed.update(dict.fromkeys(names.split(", "), package))
    assert listed == {task.name: task.origin.split()[0] for task in TASKS if task.origin is not None}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_schema_compiles(task: Any) -> None:
    validator_for(task.schema, Draft202012Validator).check_schema(task.schema)
    build(OutputFormat("json_schema", task.schema, "schema"), byte_tokenizer())


@pytest.mark.real_model
@pytest.mark.slow
def test_answers_end_valid_and_alike_with_and_without_speculation() -> None:
    drafted = 0
    with benchmark.Bench("smollm2-135m", max_tokens=200) as bench:
        for task in TASKS:
            if task.name not in ("sentiment", "tree", "kube-port"):
                continue
            visits = [bench.ask(task, way) for way in ("auto", "auto without grammar", "off")]
            assert len({visit.text for visit in visits}) == 1
            assert {visit.finish_reason for visit in visits} == {"stop"}
            assert all(benchmark.is_valid(visit.text, task.schema) for visit in visits)
            drafted += visits[0].accepted
    assert drafted > 0
