"""Traffic that repeats itself, as agents' does: the same tasks again and again with small changes.

    python benchmarks/agent_traffic.py --streams 1,8 --rounds 3 --json benchmarks/results/agent-traffic.json

There are 40 records of employees. In each round one fact of each changes; in even rounds the model is asked to write
the record as JSON from the facts, in odd ones to rewrite the JSON of before with the change. The first round only fills
the memory. All arms answer the same requests, in turns that rotate, task by task at one stream, else by as many tasks
as there are streams. Prompts are read before the time starts (they are in the prefix cache), so that figures are those
of decoding; the time of several streams ends with the last of their answers. Every text is compared with plain
decoding's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import msgspec

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo, Request, drafters_of
from pilotfish.server.cli.command import positives
from pilotfish.server.cli.prompts import encode
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

MEMORY = "suffix-memory"
ARMS = {"plain": "off", "auto": "auto", "auto without memory": "auto", MEMORY: MEMORY}
"""Arms, and the request's `speculation`."""
FACTS = {
    "name": "Anna Berg,Luis Ortega,Mei Tanaka,Omar Haddad,Ivy Clarke,Jonas Weber,Priya Nair,Sara Lind,Tom Baker",
    "email": "work,office,staff,team,mail,contact,hello,desk",
    "department": "Sales,Research,Finance,Support,Logistics,Design,Legal,Operations",
    "title": "Manager,Analyst,Engineer,Assistant,Director,Consultant,Designer,Auditor",
    "city": "Lisbon,Oslo,Osaka,Cairo,Leeds,Bremen,Kochi,Malmo,Boston,Lyon",
    "phone": "555-0101,555-0123,555-0142,555-0168,555-0175,555-0188,555-0193,555-0199",
    "start_date": "2019-03-01,2020-07-15,2021-01-10,2018-11-05,2022-06-30,2017-09-12",
    "salary": "41000,52500,63800,47250,58900,70100,45600,66400",
    "manager": "Erik Holm,Rosa Diaz,Ken Mori,Nadia Aziz,Paul Grant,Ute Klein",
    "skills": "Excel and SQL,Python and Linux,German and French,Planning and budgets,Figma and CSS,Contracts and tax",
    "notes": "Works from home on Fridays,Leads the safety training,Prefers calls in the morning,Mentors two trainees",
}


@dataclass(frozen=True)
class Visit:
    """What an arm took for one group of tasks."""

    arm: str
    streams: int
    round: int
    tasks: list[int]
    tokens: int
    steps: int
    accepted: dict[str, int]
    seconds: float
    """From the first token of the last of them to start, to the last token of all."""
    same_text: bool = True


class Traffic:
    """The tasks: prompts by round."""

    def __init__(self, tokenizer: Tokenizer, tasks: int, seed: int = 0) -> None:
        self._tokenizer, self._rng = tokenizer, random.Random(seed)
        self._choices = {name: values.split(",") for name, values in FACTS.items()}
        self.facts = [{name: self._rng.choice(values) for name, values in self._choices.items()} for _ in range(tasks)]

    def round(self, number: int) -> list[list[int]]:
        """Return each task's prompt, with one fact changed since the round before."""
        prompts = []
        for task, facts in enumerate(self.facts):
            before, changed = dict(facts), self._rng.choice(list(facts))
            if number:
                facts[changed] = self._rng.choice([each for each in self._choices[changed] if each != facts[changed]])
            if number % 2 == 0:
                listed = "\n".join(f"{name}: {value}" for name, value in facts.items())
                asked = "Write this employee as a JSON object with the same fields, and nothing else."
                text = f"{asked}\nid: {task}\n{listed}"
            else:
                record = json.dumps({"id": task, **before}, indent=2)
                asked = f'Write this JSON object again with "{changed}" set to "{facts[changed]}", and nothing else.'
                text = f"{record}\n{asked}"
            prompts.append(encode(self._tokenizer, text))
        return prompts


class Bench:
    """An engine on which arms take turns."""

    def __init__(self, model: str, max_tokens: int, temperature: float = 0.0) -> None:
        self.llm = LLM(model, prefix_caching=True)
        self.params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        self.texts: dict[tuple[int, ...], list[int]] = {}

    def visit(self, arm: str, number: int, streams: int, tasks: Sequence[int], prompts: Sequence[list[int]]) -> Visit:
        """Answer the prompts at once. Their texts are compared with those of the first arm that had them."""
        params = [msgspec.structs.replace(self.params, seed=task) for task in tasks]
        self.llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), speculation="off")
        requests = self.llm.requests(prompts, params, speculation=ARMS[arm])
        found = without_memory if arm == "auto without memory" else drafters_of
        with patch("pilotfish.engine.core.drafters_of", found):
            return self._timed(arm, number, streams, tasks, requests)

    def _timed(self, arm: str, number: int, streams: int, tasks: Sequence[int], requests: list[Request]) -> Visit:
        answers: dict[str, list[int]] = {request.id: [] for request in requests}
        waiting, steps, accepted, start, first = set(answers), 0, dict[str, int](), 0.0, 0
        for delta in self.llm.stream(requests):
            answers[delta.request_id] += delta.token_ids
            if delta.request_id in waiting and delta.token_ids:
                waiting.remove(delta.request_id)
                if not waiting:
                    start, first = time.perf_counter(), sum(map(len, answers.values()))
            if delta.accepted:
                accepted[delta.drafter] = accepted.get(delta.drafter, 0) + delta.accepted
            steps += delta.stats.steps if delta.stats is not None else 0
        seconds = time.perf_counter() - start
        same = all(
            self.texts.setdefault((number, task, streams), answer) == answer
            for task, answer in zip(tasks, answers.values(), strict=True)
        )
        tokens = sum(map(len, answers.values())) - first
        return Visit(arm, streams, number, list(tasks), tokens, steps, accepted, seconds, same)


def without_memory(request: Request, info: EngineInfo) -> tuple[str, ...]:
    return tuple(name for name in drafters_of(request, info) if name != MEMORY)


def run(bench: Bench, traffic: Traffic, arms: Sequence[str], streams: int, rounds: int) -> Iterator[Visit]:
    for number in range(rounds + 1):
        prompts = traffic.round(number)
        for turn, first in enumerate(range(0, len(prompts), streams)):
            tasks = range(first, min(len(prompts), first + streams))
            for at in range(len(arms)):
                arm = arms[(turn + number + at) % len(arms)]
                visit = bench.visit(arm, number, streams, tasks, [prompts[task] for task in tasks])
                if number:
                    yield visit


def report(visits: Sequence[Visit], arms: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| streams | arm | tok/s | by plain | tokens a step | same text |"
    yield "|---|---|---|---|---|---|"
    for streams in dict.fromkeys(visit.streams for visit in visits):
        plain = 0.0
        for arm in arms:
            own = [visit for visit in visits if (visit.streams, visit.arm) == (streams, arm)]
            tokens, seconds = sum(v.tokens for v in own), sum(v.seconds for v in own)
            plain = plain or tokens / seconds
            per_step = tokens / max(1, sum(v.steps for v in own))
            same = sum(v.same_text for v in own)
            speed = f"{tokens / seconds:.0f} | {tokens / seconds / plain:.2f} | {per_step:.2f}"
            yield f"| {streams} | {arm} | {speed} | {same} of {len(own)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=positives, default=[1, 8])
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after the one that fills the memory")
    parser.add_argument("--arm", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="where to write the figures of every visit")
    parser.add_argument("--show", action="store_true", help="print the first tasks' answers")
    args = parser.parse_args()
    arms = list(dict.fromkeys(("plain", *args.arm)))
    tokenizer = load_tokenizer(resolve(args.model))
    visits: list[Visit] = []
    for streams in args.streams:
        bench = Bench(args.model, args.max_tokens, args.temperature)
        begun = time.perf_counter()
        for visit in run(bench, Traffic(tokenizer, args.tasks), arms, streams, args.rounds):
            visits.append(visit)
        print(f"{streams} streams: {time.perf_counter() - begun:.0f} s", flush=True)
        if args.show:
            for (number, task, _), answer in list(bench.texts.items()):
                if task < 3:
                    print(f"--- round {number}, task {task}: {len(answer)} tokens\n{tokenizer.decode(answer)}")
        bench.llm.close()
    print("", *report(visits, arms), sep="\n")
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(asdict(visit)) for visit in visits) + "\n]\n")


if __name__ == "__main__":
    main()
