"""The cost of verification: a model's pass over spans of 1, 2, ... rows, for one sequence and for several.

    python benchmarks/verify_cost.py --sequences 1,8 --rows 1,2,5,9,16

A span of k + 1 rows verifies k drafted tokens. Each round visits all row counts, so that ratios hold on a noisy
machine. Figures are medians of the rounds; a ratio is taken within its round, to the first row count.
"""

from __future__ import annotations

import argparse
import statistics
import time

from pilotfish.engine.build import build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.server.cli.command import positives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kernels", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--sequences", type=positives, default=[1, 8])
    parser.add_argument("--rows", type=positives, default=[1, 2, 5, 9, 16])
    parser.add_argument("--context", type=int, default=200, help="tokens before the span")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    engine = build(EngineConfig(model=args.model, kernels=args.kernels), lambda what, share: None)
    blocks_each = -(-(args.context + max(args.rows)) // engine.info.block_size)
    print("| sequences | rows each | pass, ms | ratio |\n|---|---|---|---|")
    for count in args.sequences:
        tables = [engine.pool.allocate(blocks_each) for _ in range(count)]
        if any(table is None for table in tables):
            raise SystemExit(f"the KV cache is too small for {count} sequences of {args.context} tokens")
        filled = [Span([1] * args.context, 0, table or []) for table in tables]
        for span in filled:
            engine.runner.run([span])
        rounds = []
        for _ in range(args.rounds + 1):
            times = {}
            for rows in args.rows:
                spans = [Span([1] * rows, args.context, table or [], logit_rows=rows) for table in tables]
                start = time.perf_counter()
                engine.runner.run(spans)
                times[rows] = 1e3 * (time.perf_counter() - start)
            rounds.append(times)
        del rounds[0]  # warm-up
        for rows in args.rows:
            ratio = statistics.median(times[rows] / times[args.rows[0]] for times in rounds)
            print(f"| {count} | {rows} | {statistics.median(times[rows] for times in rounds):.1f} | {ratio:.2f} |")
        for table in tables:
            engine.pool.release(table or [])


if __name__ == "__main__":
    main()
