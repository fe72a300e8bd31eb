"""Attention by the CPU's own kernels: milliseconds and arithmetic per second, by rows, context and form of the cache.

    python benchmarks/cpu_attention.py
    python benchmarks/cpu_attention.py --heads 4 --kv-heads 1 --head-dim 256 --rows 1,128 --contexts 2560

A case is `--streams` spans of so many rows, each the last of its context, in caches of random numbers. Cases are taken
in turn, `--rounds` times, and medians reported: of one layer's attention, in GFLOP/s (4 operations a head, dimension
and visible key), and as a share of what this package's own matrix product reaches over 480 rows. With one thread
--processor-time counts this process's time alone, whoever else uses the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.attention.native import NativeAttention

CPU = torch.device("cpu")
FORMS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rows", type=numbers, default=[1, 9, 128, 512], help="of a span")
    parser.add_argument("--contexts", type=numbers, default=[512, 2560])
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--forms", default="float32", help="of the cache, by commas: float32, bf16, int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", type=int, default=None, help="instruction set: 0, 1 (AVX2) or 2 (AVX-512)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="with one thread: not what others take")
    args = parser.parse_args()
    kernels = NativeKernels(args.level)
    kernels.set_threads(args.threads)
    cases = {
        (rows, context, form): case(kernels, args, rows, context, FORMS[form])
        for form in args.forms.split(",")
        for rows in args.rows
        for context in args.contexts
        if rows <= context
    }
    peak = product(kernels)
    times: dict[tuple[int, int, str], list[float]] = {name: [] for name in cases}
    rates: list[float] = []
    clock = time.process_time if args.processor_time else time.perf_counter
    for _ in range(args.rounds):
        for name, run in cases.items():
            times[name].append(timed(run, clock))
        rates.append(480 * 1536 * 576 * 2 / timed(peak, clock))
    rate = statistics.median(rates)
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s\n")
    print("| rows | context | cache | ms | GFLOP/s | of the product's |\n|---|---|---|---|---|---|")
    for (rows, context, form), seconds in times.items():
        middle = statistics.median(seconds)
        seen = sum(min(key, args.window or key) for key in range(context - rows + 1, context + 1))
        flops = 4 * args.heads * args.head_dim * seen * args.streams / middle
        print(f"| {rows} | {context} | {form} | {1e3 * middle:.3f} | {flops / 1e9:.0f} | {flops / rate:.2f} |")


def case(
    kernels: NativeKernels, args: argparse.Namespace, rows: int, context: int, dtype: torch.dtype
) -> Callable[[], object]:
    backend, heads, kv_heads = NativeAttention(kernels), args.heads, args.kv_heads
    blocks = -(-context // 16)
    cache = backend.allocate(blocks * args.streams, 16, kv_heads, args.head_dim, dtype, CPU)
    order = torch.randperm(blocks * args.streams).tolist()
    tables = [order[i * blocks : (i + 1) * blocks] for i in range(args.streams)]
    params = AttentionParams(args.head_dim**-0.5, args.window)

    def attend(spans: list[Span]) -> Callable[[], object]:
        count = sum(len(span.token_ids) for span in spans)
        qkv = torch.randn(count, heads + 2 * kv_heads, args.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        batch = flatten(spans, 16, CPU).attention
        return lambda: backend.attend(query, key, value, cache, batch, params)

    attend([Span([0] * context, 0, table) for table in tables])()
    return attend([Span([0] * rows, context - rows, table) for table in tables])


def product(kernels: NativeKernels) -> Callable[[], object]:
    x, weight = torch.randn(480, 576), kernels.prepare_linear(torch.randn(1536, 576))
    return lambda: kernels.linear(x, weight)


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the fewest seconds of some runs: what other programs take is not to be counted."""
    best, start = float("inf"), clock()
    while clock() - start < 0.1:
        begin = clock()
        run()
        best = min(best, clock() - begin)
    return best


if __name__ == "__main__":
    main()
