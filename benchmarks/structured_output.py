"""Answers that keep to JSON schemas: do they end, are they valid, is their text the same without speculation, and how
fast do they come?

    python benchmarks/structured_output.py --rounds 3 --json benchmarks/results/structured-output.json

Each schema of benchmarks/schemas is asked for greedily in four ways, which take turns: with `auto`, with `auto` less
the grammar's drafter, without speculation, and with `auto` but without the schema (free text, of at most --free-tokens:
later SmolLM2 repeats itself, which is drafted well). Figures:

- tok/s: tokens of an answer after its first by the time from the first to the last; the median of the rounds;
- a ratio is taken schema by schema; the median is over the schemas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo, Request, drafters_of
from pilotfish.server.cli.prompts import encode
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.matcher import load_vocabulary
from pilotfish.text.grammar.output_format import OutputFormat, build
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

SCHEMAS = Path(__file__).parent / "schemas"
WAYS = {"auto": "auto", "auto without grammar": "auto", "off": "off", "free text": "auto"}
"""How a schema is asked for, and the request's `speculation`."""
INSTRUCTION = "Answer in JSON."


@dataclass(frozen=True)
class Task:
    """A schema and the prompt for which an answer must match it."""

    name: str
    origin: str | None
    """The package, file and place that it was cut from; None: written for this benchmark."""
    prompt: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class Visit:
    """One answer. `accepted` are drafted tokens that were right."""

    schema: str
    way: str
    round: int
    text: str
    finish_reason: str
    valid: bool
    tokens: int
    accepted: int
    steps: int
    tokens_per_second: float


def read_tasks(folder: Path = SCHEMAS) -> list[Task]:
    return [Task(path.stem, **json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


class Bench:
    """An engine, and the grammars of the tasks."""

    def __init__(self, model: str, max_tokens: int = 512, free_tokens: int = 128) -> None:
        self.llm = LLM(model, prefix_caching=False, suffix_memory=0)
        self.tokenizer: Tokenizer = load_tokenizer(resolve(model))
        info = self.llm.info
        self._vocabulary = load_vocabulary(resolve(model), info.vocab_size, info.eos_token_ids)
        self._max_tokens, self._free_tokens = max_tokens, free_tokens

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.close()

    def ask(self, task: Task, way: str, round_: int = 0) -> Visit:
        grammar = None if way == "free text" else self._grammar(task)
        limit = self._free_tokens if way == "free text" else self._max_tokens
        params = SamplingParams(temperature=0.0, max_tokens=limit, grammar=grammar)
        prompt = encode(self.tokenizer, f"{task.prompt} {INSTRUCTION}" if grammar else task.prompt)
        (request,) = self.llm.requests([prompt], params, speculation=WAYS[way])
        if way == "auto without grammar":
            with patch("pilotfish.engine.core.drafters_of", without_grammar):
                return self._answer(request, task, way, round_)
        return self._answer(request, task, way, round_)

    def _answer(self, request: Request, task: Task, way: str, round_: int) -> Visit:
        tokens: list[int] = []
        first, first_tokens, last = 0.0, 0, None
        for last in self.llm.stream([request]):
            if last.token_ids and not first:
                first, first_tokens = time.perf_counter(), len(last.token_ids)
            tokens += last.token_ids
        seconds = time.perf_counter() - first
        assert last is not None
        assert last.stats is not None
        assert last.finish_reason is not None
        text = self.tokenizer.decode(tokens)
        return Visit(
            schema=task.name,
            way=way,
            round=round_,
            text=text,
            finish_reason=last.finish_reason,
            valid=is_valid(text, task.schema),
            tokens=len(tokens),
            accepted=last.stats.accepted_tokens,
            steps=last.stats.steps,
            tokens_per_second=(len(tokens) - first_tokens) / seconds,
        )

    def _grammar(self, task: Task) -> Grammar:
        return build(OutputFormat("json_schema", task.schema, "schema"), self._vocabulary)


def without_grammar(request: Request, info: EngineInfo) -> tuple[str, ...]:
    return tuple(name for name in drafters_of(request, info) if name != "grammar")


def speed(visits: Sequence[Visit], schema: str, way: str) -> float:
    """The median of the rounds."""
    return statistics.median(v.tokens_per_second for v in visits if (v.schema, v.way) == (schema, way))


def report(visits: Sequence[Visit], tasks: Sequence[Task]) -> Iterator[str]:
    """Lines of Markdown."""
    answers = {(v.schema, v.way): v for v in visits}
    names = [task.name for task in tasks]
    ended = [name for name in names if answers[name, "auto"].finish_reason == "stop"]
    same = [name for name in names if len({answers[name, way].text for way in list(WAYS)[:3]}) == 1]
    yield f"- {len(ended)} of {len(names)} answers end by themselves"
    yield f"- {sum(answers[name, 'auto'].valid for name in ended)} of those {len(ended)} are valid"
    yield f"- {len(same)} of {len(names)} have the same text with `auto`, without the grammar's drafter, and with `off`"
    yield ""
    yield "| | tok/s, median | `auto` by it, median | tokens a step, median |"
    yield "|---|---|---|---|"
    for way in WAYS:
        speeds = [speed(visits, name, way) for name in names]
        ratios = [speed(visits, name, "auto") / each for name, each in zip(names, speeds, strict=True)]
        per_step = [answers[name, way].tokens / max(1, answers[name, way].steps) for name in names]
        figures = map(statistics.median, (speeds, ratios, per_step))
        yield "| {} | {:.1f} | {:.2f} | {:.2f} |".format(way, *figures)


def rows(visits: Sequence[Visit]) -> Iterator[dict[str, Any]]:
    """The visits as JSON, with the text of the first round's `auto` alone."""
    for visit in visits:
        row = asdict(visit)
        if visit.round or visit.way != "auto":
            del row["text"]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemas", type=Path, default=SCHEMAS, help="folder")
    parser.add_argument("--only", nargs="*", help="names of schemas")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--free-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures of every answer")
    args = parser.parse_args()
    tasks = [task for task in read_tasks(args.schemas) if not args.only or task.name in args.only]
    visits: list[Visit] = []
    with Bench(args.model, args.max_tokens, args.free_tokens) as bench:
        bench.ask(tasks[0], "auto")  # warm up
        for round_ in range(args.rounds):
            for number, task in enumerate(tasks):
                turn = (number + round_) % len(WAYS)
                for way in [*WAYS, *WAYS][turn : turn + len(WAYS)]:
                    visits.append(bench.ask(task, way, round_))
                row = {visit.way: visit for visit in visits[-len(WAYS) :]}
                speeds = ", ".join(f"{way} {row[way].tokens_per_second:.0f}" for way in WAYS)
                mine = row["auto"]
                print(f"{task.name}: {mine.finish_reason}, {mine.tokens} tokens; tok/s {speeds}", flush=True)
    print("", *report(visits, tasks), sep="\n")
    if args.json:
        args.json.write_text("[\n" + ",\n".join(map(json.dumps, rows(visits))) + "\n]\n")


if __name__ == "__main__":
    main()
