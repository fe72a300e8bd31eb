"""Running a benchmark: arms alternate on one LLM, in a closed loop. `rows` defines the figures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import msgspec
import numpy as np

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, Request, RequestStats, check_request
from pilotfish.errors import ConfigError, PilotfishError
from pilotfish.tools.bench.arms import VANILLA, Arm
from pilotfish.tools.bench.rows import Row

WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Models, arms, prompts and loads of a run; every arm gets the same."""

    model: str
    """The target's name in rows."""
    arms: Sequence[Arm]
    """The arms, as `arms_of` returns them: vanilla is one of them."""
    suites: Mapping[str, Sequence[Sequence[int]]]
    """Prompts as token ids by the suite's name. A suite with fewer prompts than the concurrency repeats them."""
    concurrency: Sequence[int]
    rounds: int
    params: SamplingParams
    """Sampling parameters; the seed (None is 0) is the first prompt's, and grows by one for each prompt."""

    @property
    def total(self) -> int:
        """The number of requests of a whole run, without the warm-up."""
        visits = sum(max(len(prompts), load) for prompts in self.suites.values() for load in self.concurrency)
        return visits * len(self.arms) * self.rounds


def check(benchmark: Benchmark, llm: LLM) -> None:
    """Raise ConfigError or ParameterError for a benchmark that this LLM cannot run to its end."""
    if llm.config.prefix_caching:
        raise ConfigError("prefix_caching is on: later arms would find the prompts of earlier ones in the cache")
    if max(benchmark.concurrency) > llm.info.max_num_seqs:
        raise ConfigError(
            f"concurrency is {max(benchmark.concurrency)}, but only {llm.info.max_num_seqs} sequences run in one step: "
            "raise max_num_seqs"
        )
    for prompts in benchmark.suites.values():
        for request in _requests(llm, benchmark.arms[0], prompts, benchmark.params, 0):
            check_request(request, llm.info)


def warm_up(benchmark: Benchmark, llm: LLM) -> None:
    """Decode a few tokens with every arm, at the highest concurrency."""
    prompts = next(iter(benchmark.suites.values()))
    load = max(benchmark.concurrency)
    params = msgspec.structs.replace(benchmark.params, max_tokens=min(benchmark.params.max_tokens, WARM_UP_TOKENS))
    for arm in benchmark.arms:
        _visit(llm, list(islice(_requests(llm, arm, prompts, params, load), load)), load, lambda: None)


def run(benchmark: Benchmark, llm: LLM, on_end: Callable[[], object]) -> Iterator[list[Row]]:
    """Yield the rows of all arms on one suite at one concurrency in one round.

    Each round starts with another arm. At concurrency 1 the arms alternate request by request, so that a machine's
    changing speed affects all alike. `on_end` is called after each request.
    """
    for number in range(benchmark.rounds):
        for suite, prompts in benchmark.suites.items():
            for load in benchmark.concurrency:
                requests = {arm.name: _requests(llm, arm, prompts, benchmark.params, load) for arm in benchmark.arms}
                visits = {arm.name: _Visit() for arm in benchmark.arms}
                parts = 1 if load > 1 else len(prompts)
                for part in range(parts):
                    for arm in _rotated(benchmark.arms, number + part):
                        visits[arm.name].add(_visit(llm, requests[arm.name][part::parts], load, on_end))
                name, vanilla = benchmark.model, visits[VANILLA]
                yield [_row(name, arm, suite, load, number, visit, vanilla) for arm, visit in visits.items()]


@dataclass(slots=True)
class _Answer:
    began: float = 0.0
    """time.perf_counter(), as all times here."""
    last: float = 0.0
    ttft: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    """Seconds before each token after those of the first step."""
    stats: RequestStats | None = None

    def extend(self, delta: Delta, now: float) -> None:
        count = len(delta.token_ids)
        if count and not self.token_ids:
            self.ttft = now - self.began
        elif count:
            self.pauses += [(now - self.last) / count] * count
        self.last = now if count else self.last
        self.token_ids += delta.token_ids
        if delta.finish_reason is not None:
            if delta.finish_reason not in ("stop", "length"):
                raise PilotfishError(f"request {delta.request_id} ended by {delta.finish_reason}: {delta.error}")
            self.stats = delta.stats


@dataclass(slots=True)
class _Visit:
    seconds: float = 0.0
    answers: list[_Answer] = field(default_factory=list)

    def add(self, other: _Visit) -> None:
        self.seconds += other.seconds
        self.answers += other.answers

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds

    @property
    def texts(self) -> list[list[int]]:
        return [answer.token_ids for answer in self.answers]


def _rotated(arms: Sequence[Arm], first: int) -> list[Arm]:
    first %= len(arms)
    return [*arms[first:], *arms[:first]]


def _requests(
    llm: LLM, arm: Arm, prompts: Sequence[Sequence[int]], params: SamplingParams, at_least: int
) -> list[Request]:
    chosen = list(islice(cycle(prompts), max(len(prompts), at_least)))
    seed = params.seed or 0
    own = [msgspec.structs.replace(params, seed=seed + i) for i in range(len(chosen))]
    return llm.requests(chosen, own, speculation=[arm.speculation] * len(chosen))


def _visit(llm: LLM, requests: Sequence[Request], concurrency: int, on_end: Callable[[], object]) -> _Visit:
    """Run the requests with `concurrency` of them in flight: one starts when another ends."""
    core = llm.core
    waiting, live = deque(requests), 0
    answers = {request.id: _Answer() for request in requests}
    start = time.perf_counter()
    while waiting or live:
        while waiting and live < concurrency:
            request = waiting.popleft()
            answers[request.id].began = time.perf_counter()
            core.add(msgspec.structs.replace(request, arrival=time.monotonic()))
            live += 1
        deltas = core.step().deltas
        now = time.perf_counter()
        for delta in deltas:
            answers[delta.request_id].extend(delta, now)
            if delta.finish_reason is not None:
                live -= 1
                on_end()
    return _Visit(time.perf_counter() - start, list(answers.values()))


def _row(model: str, arm: str, suite: str, concurrency: int, number: int, visit: _Visit, vanilla: _Visit) -> Row:
    stats = [answer.stats for answer in visit.answers if answer.stats is not None]
    drafted = sum(each.drafted_tokens for each in stats)
    pauses = [pause for answer in visit.answers for pause in answer.pauses]
    p50, p99 = np.percentile(pauses, (50, 99)).tolist() if pauses else (None, None)
    return Row(
        model=model,
        arm=arm,
        suite=suite,
        concurrency=concurrency,
        round=number,
        tokens_per_second=visit.tokens_per_second,
        speedup=visit.tokens_per_second / vanilla.tokens_per_second,
        mean_accepted_length=sum(each.generated_tokens for each in stats) / sum(each.steps for each in stats),
        acceptance_rate=sum(each.accepted_tokens for each in stats) / drafted if drafted else None,
        ttft_ms=1e3 * float(np.median([answer.ttft for answer in visit.answers])),
        itl_p50_ms=None if p50 is None else 1e3 * p50,
        itl_p99_ms=None if p99 is None else 1e3 * p99,
        identical_text=visit.texts == vanilla.texts,
    )
