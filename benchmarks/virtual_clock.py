"""The controller in virtual time: what `pilotfish bench` measures of its choices, without a machine's noise.

    python benchmarks/virtual_clock.py record --model smollm2-135m --prompts mt_bench.jsonl --out smollm2.json
    python benchmarks/virtual_clock.py replay smollm2.json --concurrency 1,4,8,16

`record` runs the real engine, plainly, and notes each answer and what every draft that costs time would have proposed
at each of its places. Neither depends on who drafts. So `replay` needs no model: scheduler, speculator, controller and
look-up drafters are the real ones, the target's tokens and the heads' drafts are the recorded ones, and each pass takes
what a table says (COSTS). A run takes seconds and is the same to the last digit, so two versions of the controller can
be compared. `--jitter` brings a machine's noise back, the same in each run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.execution.graphs import GraphPlan
from engine.llm import LLM
from engine.memory.block_pool import BlockPool
from engine.memory.block_table import BlockTable
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.speculation.controller import Controller
from engine.speculation.cost import RowCost
from engine.speculation.drafter import NO_DRAFT, Draft, Drafter, DraftRequest
from engine.speculation.eagle3 import MOST_PENDING
from engine.speculation.ngram import NgramDrafter
from engine.speculation.portfolio import CALIBRATED
from engine.speculation.speculator import Speculator
from engine.speculation.suffix import SuffixDrafter
from engine.weights.catalog import resolve
from server.commands.prompts import encode, read_suites
from server.tokenizer import load_tokenizer

LONGEST = 8
AT_ONCE = 8
"""Answers that are recorded at the same time."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds. Between the rows of a table lines; beyond it the last line goes on."""

    verifying: dict[int, float]
    """A pass of the target by rows, with logits of each."""
    reading: dict[int, float]
    """The same with logits of one row."""
    context_token: float
    """Of the KV cache of all sequences of the pass."""
    drafting: dict[str, dict[int, float]]
    """A pass of a draft by rows."""
    step: float = 0.35
    sequence: float = 0.05
    """The engine's own work in a step, and for each of its sequences: about what `step_overhead.py` shows, for all arms
    alike."""


COSTS = {
    # On two shared cores, float32, 200 tokens of context: the least of 150 passes up to 16 rows and of 24 beyond.
    "smollm2-135m": Costs(
        verifying={
            1: 10.0, 2: 11.3, 4: 11.4, 6: 12.2, 8: 12.8, 9: 13.1, 12: 14.0, 16: 17.6, 24: 23.9, 32: 29.3, 48: 43.4,
            64: 54.7, 96: 84.1, 128: 108.8, 256: 238.5,
        },
        reading={
            1: 10.0, 2: 11.3, 4: 11.4, 6: 12.1, 8: 12.7, 9: 13.0, 12: 13.8, 16: 16.9, 24: 22.9, 32: 28.3, 48: 37.9,
            64: 49.2, 96: 71.7, 128: 98.1, 256: 187.9,
        },
        context_token=0.0017,
        drafting={
            "smollm2-135m-eagle3": {
                1: 0.63, 2: 0.65, 4: 0.72, 6: 0.85, 9: 0.98, 12: 1.08, 16: 1.26, 24: 1.73, 32: 2.14, 64: 3.78,
                256: 13.6,
            },
            "smollm2-135m-eagle3-small": {
                1: 0.31, 2: 0.32, 4: 0.37, 6: 0.46, 9: 0.56, 12: 0.62, 16: 0.72, 24: 1.08, 32: 1.20, 64: 2.16, 256: 8.0,
            },
        },
    ),
    "gemma-3-270m": Costs(
        verifying={
            1: 16.8, 2: 18.3, 4: 19.0, 6: 19.3, 9: 19.7, 12: 21.4, 16: 28.9, 24: 40.0, 32: 60.0, 48: 87.6, 64: 113.3,
            96: 172.3, 128: 233.2, 256: 460.9,
        },
        reading={
            1: 16.8, 2: 18.3, 4: 18.1, 6: 18.5, 9: 18.8, 12: 20.1, 16: 24.7, 24: 29.8, 32: 35.6, 48: 45.2, 64: 53.8,
            96: 74.3, 128: 98.9, 256: 184.0,
        },
        context_token=0.0008,
        drafting={
            "gemma-3-270m-eagle3": {
                1: 0.87, 2: 0.91, 4: 0.98, 6: 1.13, 9: 1.38, 12: 1.48, 16: 1.71, 24: 2.44, 32: 3.03, 64: 5.30,
                256: 18.8,
            },
        },
    ),
}  # fmt: skip


# ---- record


class Listener(Speculator):
    """Drafts nothing, and notes what each draft that costs time would propose."""

    def __init__(self, drafters: list[Drafter], max_model_len: int) -> None:
        super().__init__(drafters, LONGEST, max_model_len, None)
        self.heard: dict[str, dict[str, dict[int, Draft]]] = {}
        """By sequence, drafter and tokens so far."""

    def draft(self, sequences: list[Sequence], other_rows: int = 0) -> dict[Sequence, Draft]:
        for name, drafter in self._costly.items():
            drafts = drafter.propose([DraftRequest(sequence, LONGEST) for sequence in sequences])
            for sequence, draft in zip(sequences, drafts, strict=True):
                self.heard.setdefault(sequence.id, {}).setdefault(name, {})[len(sequence.tokens)] = draft
        return {}


def record(args: argparse.Namespace) -> None:
    """Write {"model", "max_tokens", "suites": {suite: [{"prompt", "answer", "drafts": {drafter: [[tokens,
    confidences], ...]}}]}}; a drafter's list has an entry for each place of the answer but the first."""
    tokenizer = load_tokenizer(resolve(args.model))
    suites = read_suites(args.prompts, args.questions)
    written: dict[str, Any] = {}
    with LLM(
        model=args.model,
        prefix_caching=False,
        kv_cache_memory=1 << 30,
        max_num_seqs=AT_ONCE,
        num_threads=args.num_threads,
        num_draft_tokens=LONGEST,
    ) as llm:
        core = llm.core
        engine = core._engine
        drafters = [*engine.speculator._free.values(), *engine.speculator._costly.values()]
        listener = Listener(drafters, llm.info.max_model_len)
        core._engine = replace(engine, speculator=listener)
        for suite, prompts in suites.items():
            requests = llm.requests(
                [encode(tokenizer, prompt) for prompt in prompts],
                SamplingParams(temperature=0.0, max_tokens=args.max_tokens, seed=0),
                speculation="auto",
            )
            answers: dict[str, list[int]] = {request.id: [] for request in requests}
            with tqdm(total=len(requests), desc=suite, unit="req") as bar:
                for delta in llm.stream(requests):
                    answers[delta.request_id] += delta.token_ids
                    bar.update(delta.finish_reason is not None)
            written[suite] = [
                {
                    "prompt": request.prompt_ids,
                    "answer": answers[request.id],
                    "drafts": {
                        name: [
                            _written(heard.get(len(request.prompt_ids) + place, NO_DRAFT))
                            for place in range(1, len(answers[request.id]))
                        ]
                        for name, heard in listener.heard.get(request.id, {}).items()
                    },
                }
                for request in requests
            ]
            listener.heard.clear()
    Path(args.out).write_text(json.dumps({"model": args.model, "max_tokens": args.max_tokens, "suites": written}))


def _written(draft: Draft) -> tuple[tuple[int, ...], list[float]]:
    return draft.tokens, [round(confidence, 4) for confidence in draft.confidences]


# ---- replay


class Clock:
    """Seconds, by the table; each duration `jitter` more or less, and one in a hundred three times as long."""

    def __init__(self, costs: Costs, jitter: float) -> None:
        self.now = 0.0
        self._costs, self._jitter = costs, jitter
        self._random = random.Random(0)

    def __call__(self) -> float:
        return self.now

    def spend(self, milliseconds: float) -> float:
        """Let that much time go by; returns the seconds that it really took."""
        seconds = 1e-3 * milliseconds
        if self._jitter:
            seconds *= self._random.uniform(1 - self._jitter, 1 + self._jitter)
            seconds *= 3.0 if self._random.random() < 0.01 else 1.0
        self.now += seconds
        return seconds

    def target(self, rows: int, logit_rows: int, context: int) -> float:
        """Milliseconds of a pass of the target."""
        costs = self._costs
        head = line(costs.verifying, logit_rows) - line(costs.reading, logit_rows)
        return line(costs.reading, rows) + head + costs.context_token * context

    def draft(self, name: str, rows: int) -> float:
        return line(self._costs.drafting[name], rows)


def line(table: dict[int, float], rows: int) -> float:
    counts, values = list(table), list(table.values())
    if rows > counts[-1]:
        return values[-1] + (rows - counts[-1]) * (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return float(np.interp(rows, counts, values))


@dataclass(frozen=True)
class Recorded:
    """A question."""

    prompt: tuple[int, ...]
    answer: list[int]
    drafts: dict[str, list[tuple[list[int], list[float]]]]


class RecordedDrafter:
    """Proposes what a head proposed at the same place."""

    free = False

    def __init__(self, name: str, clock: Clock, questions: dict[str, Recorded]) -> None:
        self.name, self.prior = name, 0.5
        self.passes: tuple[int, ...] = ()
        self._clock, self._questions = clock, questions
        self._read: dict[str, int] = {}

    def backlog(self, sequence: Sequence) -> int:
        return min(MOST_PENDING, len(sequence.tokens) - 1 - self._read.get(sequence.id, 0))

    def try_pass(self, rows: int) -> None:
        self._clock.spend(self._clock.draft(self.name, rows))

    def capture(self, planned: Callable[[tuple[int, ...]], GraphPlan]) -> None:
        pass

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        passes = [sum(self.backlog(request.sequence) for request in requests)]
        drafts = []
        for request in requests:
            sequence = request.sequence
            self._read[sequence.id] = len(sequence.tokens) - 1
            tokens, confidences = self._questions[sequence.id].drafts[self.name][sequence.output_len - 1]
            length, chance = 0, 1.0
            while length < min(request.limit, len(tokens)) and (not length or chance >= request.floor):
                chance *= confidences[length]
                length += 1
            drafts.append(Draft(tuple(tokens[:length]), None, self.name, confidences=tuple(confidences[:length])))
        longest = max(len(draft.tokens) for draft in drafts)
        passes += [sum(len(draft.tokens) > depth for draft in drafts) for depth in range(1, longest)]
        self.passes = tuple(passes)
        for rows in passes:
            self.try_pass(rows)
        return drafts

    def release(self, sequence: Sequence) -> None:
        self._read.pop(sequence.id, None)


@dataclass
class Engine:
    """What `EngineCore` is, with recorded models and a clock that is a table."""

    recording: dict[str, Any]
    costs: Costs
    jitter: float = 0.0
    arm: tuple[str, ...] = ()
    questions: dict[str, Recorded] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self.clock = Clock(self.costs, self.jitter)
        self.heads = tuple(self.costs.drafting)
        drafters: list[Drafter] = [NgramDrafter(4, 1), SuffixDrafter()]
        drafters += [RecordedDrafter(name, self.clock, self.questions) for name in self.heads]
        self.names = tuple(drafter.name for drafter in drafters)
        self.controller = Controller(LONGEST, {drafter.name: drafter.prior for drafter in drafters})
        self.controller.target.calibrate(
            {rows: 1e-3 * self.clock.target(rows, rows, 0) for rows in CALIBRATED}, 1e-3 * self.costs.context_token
        )
        for name in self.heads:
            cost = self.controller.drafting[name] = RowCost()
            cost.calibrate({rows: 1e-3 * self.clock.draft(name, rows) for rows in CALIBRATED})
        self.speculator = Speculator(drafters, LONGEST, 8192, self.controller, self.clock)
        self.pool = BlockPool(4096, 16, False)
        self.scheduler = Scheduler(self.pool, 64, 512)

    def visit(self, questions: list[Recorded], drafters: tuple[str, ...], concurrency: int) -> Visit:
        """All the questions, so many at a time."""
        waiting, live, visit, start = deque(questions), 0, Visit(), self.clock.now
        while waiting or live:
            while waiting and live < concurrency:
                self._add(waiting.popleft(), drafters)
                live += 1
            live -= self._step(visit)
        visit.seconds = self.clock.now - start
        return visit

    def _add(self, question: Recorded, drafters: tuple[str, ...]) -> None:
        self.made += 1
        params = SamplingParams(temperature=0.0, max_tokens=self.recording["max_tokens"])
        request = Request(id=str(self.made), prompt_ids=question.prompt, params=params)
        self.questions[request.id] = question
        self.scheduler.add(Sequence(request, 0, BlockTable(self.pool), drafters))

    def _step(self, visit: Visit) -> int:
        """As `EngineCore.step`; returns how many sequences ended."""
        clock, begun = self.clock, self.clock.now
        drafts = self.speculator.draft(self.scheduler.decoding(), self.scheduler.prompt_rows())
        seconds = {"draft": clock.now - begun}
        plan = self.scheduler.plan(drafts)
        logit_rows = sum(len(planned.draft.tokens) + 1 for planned in plan.spans if planned.draws)
        context = sum(planned.start for planned in plan.spans)
        seconds["forward"] = clock.spend(clock.target(plan.rows, logit_rows, context))
        own = self.costs.step + self.costs.sequence * len(plan.spans)
        seconds["plan"], seconds["sample"] = clock.spend(0.7 * own), clock.spend(0.3 * own)
        ended = committed = 0
        for planned in plan.spans:
            sequence = planned.sequence
            sequence.computed = planned.stop
            if planned.draws:
                rest = self.questions[sequence.id].answer[sequence.output_len :]
                pairs = zip(planned.draft.tokens, rest, strict=False)
                accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(planned.draft.tokens))
                tokens = rest[: accepted + 1]
                visit.count(planned.draft, accepted, len(tokens), sequence.output_len > 0)
                self.speculator.observe_tokens(sequence, tokens)
                committed += len(tokens)
                sequence.tokens += tokens
                sequence.computed = len(sequence.tokens) - 1
                if len(tokens) == len(rest):
                    ended += 1
                    self.scheduler.remove(sequence)
                    self.speculator.release(sequence)
                    del self.questions[sequence.id]
        self.speculator.observe_step(self.speculator.drafted, plan.rows, seconds, committed)
        visit.drafting += seconds["draft"]
        return ended


@dataclass
class Visit:
    seconds: float = 0.0
    drafting: float = 0.0
    tokens: int = 0
    steps: int = 0
    decoded: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def count(self, draft: Draft, accepted: int, tokens: int, decoding: bool) -> None:
        self.tokens += tokens
        if decoding:
            self.steps += 1
            self.decoded += tokens
        if draft.tokens:
            self.drafted[draft.drafter] = self.drafted.get(draft.drafter, 0) + len(draft.tokens)
            self.accepted[draft.drafter] = self.accepted.get(draft.drafter, 0) + accepted


def replay(args: argparse.Namespace) -> None:
    for path in args.recordings:
        recording = json.loads(Path(path).read_text())
        name = recording["model"]
        first, every = args.part
        suites = {
            suite: [Recorded(tuple(each["prompt"]), each["answer"], each["drafts"]) for each in questions[first::every]]
            for suite, questions in recording["suites"].items()
        }
        shared = Engine(recording, COSTS[name], args.jitter)
        arms = {"vanilla": (), **{each: (each,) for each in shared.names}}
        arms |= {each: tuple(each.split("+")) for each in args.arm}
        arms["auto"] = shared.names
        print(f"\n{name}\n\n| suite | streams | {' | '.join(list(arms)[1:])} | auto / best | asked, % | drafts |")
        print("|" + "---|" * (len(arms) + 4))
        for suite, questions in suites.items():
            for load in args.concurrency:
                chosen = list(islice(cycle(questions), max(load, len(questions))))
                visits = {}
                for arm, drafters in arms.items():
                    engine = shared if args.shared else Engine(recording, COSTS[name], args.jitter)
                    visits[arm] = engine.visit(chosen, drafters, load)
                speed = {arm: visits["vanilla"].seconds / visit.seconds for arm, visit in visits.items()}
                auto, best = visits["auto"], max(value for arm, value in speed.items() if len(arms[arm]) < 2)
                drafts = ", ".join(f"{who} {auto.accepted[who]}/{count}" for who, count in auto.drafted.items())
                figures = " | ".join(f"{value:.2f}" for value in list(speed.values())[1:])
                print(
                    f"| {suite} | {load} | {figures} | {speed['auto'] / best:.3f} | "
                    f"{100 * auto.drafting / auto.seconds:.1f} | {drafts}; {auto.decoded / auto.steps:.2f} a step |"
                )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="run the engine and note texts and drafts")
    recorder.add_argument("--model", default="smollm2-135m")
    recorder.add_argument("--prompts", nargs="+", default=[], help="files; none: those that come with Pilotfish")
    recorder.add_argument("--questions", type=int, default=32, help="of each file")
    recorder.add_argument("--max-tokens", type=int, default=128)
    recorder.add_argument("--num-threads", type=int, default=1)
    recorder.add_argument("--out", required=True)
    recorder.set_defaults(run=record)
    player = commands.add_parser("replay", help="play recordings in virtual time")
    player.add_argument("recordings", nargs="+")
    player.add_argument("--concurrency", type=numbers, default=[1, 4, 8, 16])
    player.add_argument("--arm", nargs="+", default=[], help="further arms, as ngram+suffix")
    player.add_argument("--part", type=numbers, default=[0, 1], help="FIRST,EVERY: which of each suite's questions")
    player.add_argument("--jitter", type=float, default=0.0, help="of each duration, as a share of it")
    player.add_argument("--shared", action="store_true", help="one controller for all arms and suites, as in a bench")
    player.set_defaults(run=replay)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
