"""Serving: whole steps of an engine with a model in the shape of Llama-3.1-8B (random weights): tokens a second at 1 to
256 streams, plain and with drafts of a set acceptance, by the phases of a step, beside what the planner predicts.

Drafts of a set acceptance: what plain decoding wrote, with wrong tokens put in at random, is given as the prediction.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import msgspec

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.stats import StepStats
from pilotfish.tools.planner.roofline import step_seconds
from pilotfish.tools.selftest import small
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.passes import TimedModel
from pilotfish.tools.selftest.speed import card_of
from pilotfish.tools.selftest.subject import Subject, release

STREAMS = (1, 8, 64, 256)
ACCEPTANCES = (0.6, 0.8, 1.0)
DRAFTED = 4
PROMPT, TOKENS = 128, 128
SAMPLED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(),
    "top_p": SamplingParams(top_p=0.9),
}


def checks(subject: Subject) -> Iterator[Check]:
    served = _Served(subject)
    cuda = subject.device.type == "cuda"
    compares = "tokens a second of all streams; values: a step's phases, the share of captured passes, the planner's"
    for count in STREAMS if cuda else (1, 4):
        yield Check(f"plain, {count} streams", compares, partial(served.plain, count), "tokens/s")
    for acceptance in ACCEPTANCES:
        for count in STREAMS[:3] if cuda else (1,):
            name = f"drafts of {DRAFTED}, {acceptance:.0%} right, {count} streams"
            yield Check(name, compares, partial(served.drafted, acceptance, count), "tokens/s")
    for name in SAMPLED:
        for count in (1, 128) if cuda else (1,):
            run = partial(served.drawn, name, count)
            yield Check(f"drawing, {name}, {count} streams", "seconds of drawing in a step, by the host", run, "ms")
    yield Check("drafted token", "a token of a draft model in the shape of Llama-3.2-1B", served.draft_model, "ms")


@dataclass
class _Steps:
    """What steps took, those that read prompts left out."""

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    passed: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    texts: list[list[int]] = field(default_factory=list)

    def take(self, stats: StepStats, seconds: float) -> None:
        self.passed[stats.passed] += 1
        if stats.prompt_tokens:
            return
        self.seconds.append(seconds)
        self.tokens += stats.generated_tokens
        for phase, each in stats.seconds.items():
            self.phases[phase].append(each)

    def finding(self, planned: float | None) -> Finding:
        total, count = sum(self.seconds), len(self.seconds)
        values = {f"{phase} ms": 1e3 * sum(each) / count for phase, each in self.phases.items()}
        values |= {"step ms": 1e3 * total / count, "tokens a step": self.tokens / count}
        values["captured share"] = self.passed["captured"] / max(1, self.passed.total())
        if planned is not None:
            values["planned tokens/s"] = planned
        return Finding(measured=self.tokens / total, values=values)


@dataclass
class _Served:
    subject: Subject
    texts: dict[int, list[list[int]]] = field(default_factory=dict)
    """What plain decoding wrote, by the number of streams."""

    @cached_property
    def model(self) -> TimedModel:
        return TimedModel(self.subject, "served")

    @cached_property
    def llm(self) -> LLM:
        config = self.model.config
        return LLM(config=config, drafter=("ngram",), speculation="auto", num_draft_tokens=DRAFTED)

    def plain(self, count: int) -> Finding:
        steps = self._run(count, SamplingParams(temperature=0.0), "off")
        self.texts[count] = steps.texts
        return steps.finding(self._planned(count))

    def drafted(self, acceptance: float, count: int) -> Finding:
        if count not in self.texts:
            raise Skip("plain decoding with as many streams did not end")
        generator = random.Random(0)
        texts = [
            [token if generator.random() < acceptance else 1 + token % 1000 for token in text]
            for text in self.texts[count]
        ]
        steps = self._run(count, SamplingParams(temperature=0.0), "prediction", texts)
        found = steps.finding(None)
        same = sum(ours == theirs for ours, theirs in zip(steps.texts, self.texts[count], strict=True))
        return Finding(measured=found.measured, values={**found.values, "same texts": same, "texts": count})

    def drawn(self, name: str, count: int) -> Finding:
        steps = self._run(count, SAMPLED[name], "off")
        sample, forward = (steps.finding(None).values.get(f"{phase} ms", 0.0) for phase in ("sample", "forward"))
        return Finding(measured=sample, values={"forward ms": forward})

    def draft_model(self) -> Finding:
        if not self.model.cuda:
            raise Skip("the CPU's draft models are measured by `pilotfish bench`")
        self.__dict__.pop("llm").close()
        release()
        folder = small.write_published(Path(self.subject.test.directory), "llama-3.2-1b")
        with LLM(
            config=self.model.config, drafter=(str(folder),), speculation=folder.name, num_draft_tokens=DRAFTED,
            adaptive_drafts=False,
        ) as llm:  # fmt: skip
            steps = self._run(1, SamplingParams(temperature=0.0), None, llm=llm)
        draft = steps.finding(None).values["draft ms"]
        return Finding(measured=draft / DRAFTED, values={"draft ms": draft})

    def _planned(self, count: int) -> float | None:
        card = card_of(self.subject)
        if card is None:
            return None
        return count / step_seconds(self.model.planned, card, 1, count, count, PROMPT + TOKENS // 2).total

    def _run(
        self,
        count: int,
        params: SamplingParams,
        speculation: str | None,
        predictions: Sequence[Sequence[int]] = (),
        llm: LLM | None = None,
    ) -> _Steps:
        llm = llm or self.llm
        own = msgspec.structs.replace(params, max_tokens=TOKENS, ignore_eos=True, seed=0)
        prompts = [[1 + (7 * i + j) % 500 for j in range(PROMPT)] for i in range(count)]
        requests = llm.requests(prompts, own, speculation=speculation)
        found: dict[str, list[int]] = {request.id: [] for request in requests}
        if predictions:
            requests = [
                msgspec.structs.replace(request, prediction_ids=tuple(text))
                for request, text in zip(requests, predictions, strict=True)
            ]
        for request in requests:
            llm.core.add(request)
        steps = _Steps()
        while llm.core.has_work():
            begin = time.perf_counter()
            result = llm.core.step()
            steps.take(result.stats, time.perf_counter() - begin)
            for delta in result.deltas:
                found[delta.request_id] += delta.token_ids
        steps.texts = list(found.values())
        return steps
