"""How near a pass over a few rows comes to the memory's limit: bytes that it reads, by measured bandwidth.

    python benchmarks/cpu_roofline.py --model smollm2-135m --rows 1,4,9 --settings '{"dtype": "float32"}'

A pass reads every weight once, and the keys and values of its context: at few rows that is what it waits for. Bytes are
those of the tensors that the loaded model holds, as they lie in memory, and of the cache. Bandwidth is that of reading
with the same number of threads: of 1 GiB, and of as many bytes as the pass reads, a part of which may still be in the
processor's cache from one time to the next, as of the weights. (It is the fastest of several of torch's operations
that do little more than read.) The share is the time that reading would take at the second, divided by the pass's.

Each round measures everything in turn, so that ratios hold on a machine whose speed drifts; a share is taken within its
round. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.platform import thread_count
from pilotfish.server.cli.command import positive, positives

LARGE = 1 << 30


class Reading:
    """Reads as many bytes, divided among threads, in the fastest of several ways.

    The threads are Python's, which wait in the kernel afterwards: those of torch would go on spinning for a while, and
    take the processor from the pass that is measured next.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.size = size // (8 * threads) * 8 * threads
        parts = torch.ones(self.size // 4).chunk(threads)
        self._pool = ThreadPoolExecutor(threads)
        self._ways: list[list[Callable[[], object]]] = [
            [part.amax for part in parts],
            [part.norm for part in parts],
            [part.view(torch.int64).sum for part in parts],
        ]

    def rate(self) -> float:
        """Bytes per second."""
        return self.size / min(seconds_of(lambda way=way: self._read(way)) for way in self._ways)  # type: ignore[misc]

    def _read(self, way: list[Callable[[], object]]) -> None:
        for part in [self._pool.submit(read) for read in way]:
            part.result()


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """The tensors that an object of dataclasses, tuples, lists and dictionaries holds."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for each in thing:
            yield from tensors_in(each)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield from tensors_in([getattr(thing, field.name) for field in dataclasses.fields(thing)])


def pass_bytes(engine: Engine, context: int) -> int:
    """Bytes of the layers, the head, and a context's keys and values, as they lie in memory. Of rotary tables, and
    of an embedding that is not the head, a pass reads a row for each of its own: they are left out."""
    runner: Any = engine.runner
    model = runner.model
    read = {
        tensor.data_ptr(): tensor.nbytes
        for layer in model.decoder.layers
        for tensor in tensors_in(dataclasses.replace(layer, cos_sin=torch.empty(0)))
    }
    read |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors_in(model.head)}
    cached = sum(tensor.nbytes for tensor in tensors_in(runner._caches))
    tokens = engine.info.num_blocks * engine.info.block_size
    return sum(read.values()) + cached * context // tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: more settings of the engine")
    parser.add_argument("--rows", type=positives, default=[1, 4, 9])
    parser.add_argument("--context", type=positive, default=200, help="tokens before the rows")
    parser.add_argument("--rounds", type=positive, default=15)
    args = parser.parse_args()
    settings = {"model": args.model, "adaptive_drafts": False, "speculation": "none", "drafter": ("ngram",)}
    config = msgspec.convert({**settings, **args.settings}, EngineConfig).check()
    engine, threads = build(config, lambda what, share: None), thread_count(config)
    blocks = engine.pool.allocate(-(-(args.context + max(args.rows)) // engine.info.block_size))
    if blocks is None:
        raise SystemExit(f"the KV cache has no room for {args.context} tokens: raise kv_cache_memory")
    engine.runner.run([Span([1] * args.context, 0, blocks)])
    size = pass_bytes(engine, args.context)
    large, same = Reading(LARGE, threads), Reading(size, threads)

    def run(rows: int) -> None:
        engine.runner.run([Span([1] * rows, args.context, blocks, logit_rows=rows)])

    rates, rounds = [], []
    for _ in range(args.rounds + 1):
        rates.append((large.rate(), same.rate()))
        rounds.append({rows: seconds_of(lambda rows=rows: run(rows)) for rows in args.rows})  # type: ignore[misc]
    del rates[0], rounds[0]  # warm-up
    from_memory, from_both = (statistics.median(column) / 1e9 for column in zip(*rates, strict=True))
    print(
        f"{args.model}: {size / 1e6:.1f} MB a pass, {threads} threads; reading {from_memory:.1f} GB/s "
        f"(1 GiB), {from_both:.1f} GB/s ({size / 1e6:.0f} MB)\n\n| rows | pass, ms | GB/s | share |\n|---|---|---|---|"
    )
    for rows in args.rows:
        seconds = statistics.median(times[rows] for times in rounds)
        share = statistics.median(size / rate / times[rows] for (_, rate), times in zip(rates, rounds, strict=True))
        print(f"| {rows} | {1e3 * seconds:.1f} | {size / seconds / 1e9:.1f} | {share:.0%} |")
    engine.pool.release(blocks)
    engine.close()


if __name__ == "__main__":
    main()
