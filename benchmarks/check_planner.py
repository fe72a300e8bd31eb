"""Compare `pilotfish plan` with `pilotfish bench` on this machine: measured as a device, in tokens per second.

    python benchmarks/check_planner.py --model smollm2-135m --model gemma-3-270m --concurrency 1,8 --rounds 3

Everything runs in one process: each round measures the device once and visits every model with every arm, so that a
machine whose speed drifts affects both sides alike. The best round of each counts. The prediction gets the lengths of
the prompts and answers and, for arms that draft, the mean number of tokens drafted and accepted in a step; no seconds.
The arm "draft" is the target as its own draft model: every draft is accepted, at the cost of k more passes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from closed_loop import RequestLength, play
from measure_device import DeviceMeter

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.server.cli.command import positives
from pilotfish.server.cli.prompts import BUILT_IN, encode, read_suites
from pilotfish.text.tokenizer import load_tokenizer
from pilotfish.tools.bench.arms import arms_of
from pilotfish.tools.bench.rows import Row
from pilotfish.tools.bench.runner import Benchmark, run, warm_up
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.models import PlannedModel, read_shape
from pilotfish.tools.planner.roofline import draft_seconds, pass_seconds, step_seconds

MAX_BATCH_TOKENS = 128
DRAFT = "draft"


@dataclass
class Bench:
    """A model with its arms, and what was measured of it."""

    benchmark: Benchmark
    llm: LLM
    model: PlannedModel
    rows: list[Row] = field(default_factory=list)

    def round(self) -> None:
        for rows in run(self.benchmark, self.llm, lambda: None):
            self.rows += rows

    def best(self, arm: str, concurrency: int) -> Row:
        rows = [row for row in self.rows if (row.arm, row.concurrency) == (arm, concurrency)]
        return max(rows, key=lambda row: row.tokens_per_second)

    def predicted(self, device: Device, measured: Row) -> float:
        """Return the predicted tokens per second under the load of `measured`."""
        (prompts,) = self.benchmark.suites.values()
        answer, load = self.benchmark.params.max_tokens, measured.concurrency
        requests = [RequestLength(len(prompt), answer) for prompt in islice(cycle(prompts), max(len(prompts), load))]
        tokens, drafted = measured.mean_accepted_length, drafted_in_a_step(measured)

        def seconds(rows: int, sequences: int, context: int, decoding: int) -> float:
            # Prompts' rows draw no token, but for the last.
            drawn = min(rows, max(1, round(decoding * (1 + drafted))))
            step = step_seconds(self.model, device, 1, rows, sequences, context, drawn).total
            if measured.arm == DRAFT and decoding:
                step += draft_seconds(self.model, device, 1, round(drafted), decoding, context)
            return step

        total = play(requests, load, MAX_BATCH_TOKENS, seconds, drafted, tokens)
        if measured.arm == DRAFT:  # the draft model reads the prompts, too, as many rows at a time
            together = min(load, max(1, MAX_BATCH_TOKENS // max(each.prompt for each in requests)))
            lengths = [each.prompt for each in requests]
            reading = [pass_seconds(self.model, device, 1, together * n, together, n, 0) for n in lengths]
            total += sum(step.total for step in reading) / together
        return sum(each.output for each in requests) / total


def make_bench(
    name: str, arms: list[str], concurrency: list[int], questions: int, max_tokens: int, length: int
) -> Bench:
    files = resolve(name)
    llm = LLM(
        model=name,
        drafter=("ngram", "suffix", *([f"{DRAFT}={name}"] if DRAFT in arms else [])),
        num_draft_tokens=length,
        adaptive_drafts=False,
        prefix_caching=False,
        max_batch_tokens=MAX_BATCH_TOKENS,
        kv_cache_memory=2**29,
    )
    tokenizer = load_tokenizer(files)
    texts = read_suites([], questions)[BUILT_IN]
    benchmark = Benchmark(
        model=name,
        arms=arms_of(arms, llm.info),
        suites={BUILT_IN: [encode(tokenizer, text) for text in texts]},
        concurrency=concurrency,
        rounds=1,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0),
    )
    shape = read_shape(name)
    return Bench(benchmark, llm, PlannedModel(name=name, shape=shape, dtype="float32", kv_dtype="float32"))


def drafted_in_a_step(row: Row) -> float:
    """Return the mean number of drafted tokens that a request verifies in a step."""
    return (row.mean_accepted_length - 1) / row.acceptance_rate if row.acceptance_rate else 0.0


def table(benches: list[Bench], device: Device) -> Iterator[str]:
    yield "| model | streams | arm | drafted | tokens/step | predicted | measured | ratio |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for bench in benches:
        for load in bench.benchmark.concurrency:
            for arm in bench.benchmark.arms:
                row = bench.best(arm.name, load)
                predicted, measured = bench.predicted(device, row), row.tokens_per_second
                yield (
                    f"| {bench.benchmark.model} | {load} | {arm.name} | {drafted_in_a_step(row):.2f} "
                    f"| {row.mean_accepted_length:.2f} | {predicted:.1f} | {measured:.1f} "
                    f"| {predicted / measured:.2f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", dest="models", action="append")
    parser.add_argument("--arm", action="append", help="vanilla (always), ngram, suffix, draft")
    parser.add_argument("--concurrency", type=positives, default=[1, 8])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    arms = args.arm or ["ngram", DRAFT]
    with ExitStack() as stack:
        meter = DeviceMeter(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        benches = [
            make_bench(name, arms, args.concurrency, args.questions, args.max_tokens, args.num_draft_tokens)
            for name in args.models or ["smollm2-135m", "gemma-3-270m"]
        ]
        for bench in benches:
            warm_up(bench.benchmark, bench.llm)
        for _ in range(args.rounds):
            meter.round()
            for bench in benches:
                bench.round()
        device = meter.device()
    print(
        f"bandwidth {device.bandwidth / 1e9:.1f} GB/s, up to {device.flops['float32'] / 1e9:.0f} GFLOP/s, load ", end=""
    )
    print(", ".join(f"{load:.1f}" for load in os.getloadavg()), "(1, 5, 15 minutes)\n")
    print(*table(benches, device), sep="\n")


if __name__ == "__main__":
    main()
