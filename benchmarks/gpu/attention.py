"""Times each attention backend that this GPU has, at Llama-3.1-8B's shape, and compares the bits of rows alone and in
tiles: `python benchmarks/gpu/attention.py [--json FILE]`. A table of times, and of bytes of keys and values a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from triton.testing import do_bench

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionParams
from pilotfish.engine.layers.attention.choose import AttentionNeeds, choose_attention
from pilotfish.errors import ConfigError

HEADS, KV_HEADS, DIM = 32, 8, 128
DTYPE = torch.bfloat16
CUDA = torch.device("cuda")
CASES: dict[str, list[tuple[int, int]]] = {
    "decode, 512": [(512, 1)],
    "decode, 4k": [(4096, 1)],
    "decode, 32k": [(32768, 1)],
    "decode, 128k": [(131071, 1)],
    "verify 5 rows, 4k": [(4096, 5)],
    "verify 9 rows, 32k": [(32768, 9)],
    "decode, 64 of 4k": [(4096, 1)] * 64,
    "verify 5 rows, 64 of 4k": [(4096, 5)] * 64,
    "mixed drafts, 32 of 2k": [(2048, 1 + i % 9) for i in range(32)],
    "prefill, 512": [(0, 512)],
    "prefill, 2k": [(0, 2048)],
    "prefill, 8k": [(0, 8192)],
    "chunk of 512 at 32k": [(32768, 512)],
}
"""(tokens in the cache, tokens of the span) of each sequence."""


def spans_of(sequences: Sequence[tuple[int, int]], block_size: int) -> tuple[int, list[Span]]:
    """Return the number of blocks, used in random order, and the spans."""
    needed = [-(-(start + length) // block_size) for start, length in sequences]
    free = (torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)) + 1).tolist()
    return sum(needed) + 1, [
        Span([0] * length, start, [free.pop() for _ in range(count)])
        for (start, length), count in zip(sequences, needed, strict=True)
    ]


def timed(backend: AttentionBackend, sequences: Sequence[tuple[int, int]], heads: int, graph: bool) -> float:
    """Return milliseconds of one call, as the median; with `graph`, of a captured call's replay."""
    blocks, spans = spans_of(sequences, backend.block_size)
    cache = backend.allocate(blocks, backend.block_size, KV_HEADS, DIM, DTYPE, CUDA)
    cache.keys.normal_()
    cache.values.normal_()
    batch = flatten(spans, backend.block_size, CUDA).attention
    qkv = torch.randn(len(batch.slots), heads + 2 * KV_HEADS, DIM, device=CUDA, dtype=DTYPE)
    query, key, value = qkv.split((heads, KV_HEADS, KV_HEADS), dim=1)
    params = AttentionParams(DIM**-0.5)

    def call() -> object:
        return backend.attend(query, key, value, cache, batch, params)

    run = call
    if graph:
        call()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(8):
                call()
        run = captured.replay
    milliseconds: float = do_bench(run, warmup=10, rep=50, return_mode="median")
    return milliseconds / (8 if graph else 1)


def differing_rows(backend: AttentionBackend) -> int:
    """Return how many rows have other bits alone than in a span, or in a span of a batch than by itself."""
    sequences = [(n, 1 + n % 9) for n in (3, 130, 511, 1000, 2047, 4100, 9000, 16500)]
    blocks, spans = spans_of(sequences, backend.block_size)
    cache = backend.allocate(blocks, backend.block_size, KV_HEADS, DIM, DTYPE, CUDA)
    cache.keys.normal_()
    cache.values.normal_()
    params = AttentionParams(DIM**-0.5)
    batch = flatten(spans, backend.block_size, CUDA).attention
    query = torch.randn(len(batch.slots), HEADS, DIM, device=CUDA, dtype=DTYPE)
    key, value = (part.flatten(0, 1)[batch.slots] for part in (cache.keys, cache.values))
    whole = backend.attend(query, key, value, cache, batch, params)
    differing, row = 0, 0
    for span in spans:
        for i in range(len(span.token_ids)):
            alone = Span([0], span.start + i, span.blocks)
            own = flatten([alone], backend.block_size, CUDA).attention
            one = slice(row, row + 1)
            found = backend.attend(query[one], key[one], value[one], cache, own, params)
            differing += not torch.equal(found[0], whole[row])
            row += 1
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    capability = torch.cuda.get_device_capability()
    needs = AttentionNeeds(CUDA, capability, DTYPE, DTYPE, DIM, 0)
    results: list[dict[str, object]] = []
    for name in ("flash4", "flash2", "triton", "torch"):
        size = {"flash2": 256}.get(name, 0)
        try:
            backend = choose_attention(name, replace(needs, block_size=size), None)
        except ConfigError as error:
            print(f"{name}: {error}")
            continue
        if name != "torch":
            print(f"{name}: {differing_rows(backend)} rows have other bits alone than in their tile")
        for case, sequences in CASES.items():
            if name == "torch" and len(sequences) > 1:
                continue
            keys = sum(start + length for start, length in sequences)
            ms = timed(backend, sequences, HEADS, graph=backend.capturable)
            rate = keys * 2 * KV_HEADS * DIM * DTYPE.itemsize / ms / 1e6
            print(f"{name:8} {case:26} {1e3 * ms:9.1f} us {rate:8.0f} GB/s", flush=True)
            results.append({"backend": name, "case": case, "us": 1e3 * ms, "gb_per_s": rate})
    if options.json:
        with open(options.json, "w") as file:
            whole = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
            json.dump(whole, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
