"""The cost of useless drafters: a draft model with random weights, as large as the target, and lookup in random text.

    python benchmarks/hostile_portfolio.py --concurrency 1,8 --requests 8 --max-tokens 64 --rounds 3

Writes a Llama of the target's shape with random weights into a temporary folder, loads it as a draft model beside
`ngram`, and alternates vanilla and auto on prompts of random tokens, sampling at a high temperature. The promise is
that auto is never below 0.97 of vanilla.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.params import SamplingParams
from pilotfish.server.cli.command import positives
from pilotfish.tools.bench.arms import arms_of
from pilotfish.tools.bench.runner import Benchmark, check, run, warm_up
from pilotfish.tools.checkpoint import config_of, random_weights, write_model

PROMISED = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the target, of the Llama family")
    parser.add_argument("--concurrency", type=positives, default=[1, 8])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = read_config(resolve(args.model))
        draft = write_model(Path(folder), config_of(shape), random_weights(shape, 0.05, torch.bfloat16))
        drafter = ("ngram", f"random={draft}")
        settings = {
            "prefix_caching": False,
            "suffix_memory": 0,
            "kv_cache_memory": 1 << 30,
            "num_threads": args.num_threads,
        }
        with LLM(model=args.model, drafter=drafter, **settings) as llm:
            generator = random.Random(0)
            prompts = [
                [generator.randrange(llm.info.vocab_size) for _ in range(args.prompt_tokens)]
                for _ in range(args.requests)
            ]
            plan = Benchmark(
                model=args.model,
                arms=arms_of(("auto",), llm.info),
                suites={"random": prompts},
                concurrency=args.concurrency,
                rounds=args.rounds,
                params=SamplingParams(temperature=2.0, seed=1, max_tokens=args.max_tokens, ignore_eos=True),
            )
            check(plan, llm)
            warm_up(plan, llm)
            with tqdm(total=plan.total, unit="req") as bar:
                rows = [row for more in run(plan, llm, bar.update) for row in more if row.arm == "auto"]
    print("| streams | auto / vanilla: median | lowest | highest | same text |\n|---|---|---|---|---|")
    worst = 1.0
    for load in args.concurrency:
        own = [row for row in rows if row.concurrency == load]
        ratios = [row.speedup for row in own]
        worst = min(worst, statistics.median(ratios))
        same = "yes" if all(row.identical_text for row in own) else "NO"
        print(f"| {load} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {same} |")
    if worst < PROMISED:
        sys.exit(f"auto is at {worst:.3f} of vanilla, less than {PROMISED}")


if __name__ == "__main__":
    main()
