"""Backends: what each attention backend that is installed takes, and how far from float32 it is, by head size and by
length of context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.choose import AttentionNeeds, choose_attention
from pilotfish.errors import ConfigError
from pilotfish.tools.selftest.check import Check, Finding, Skip, skip
from pilotfish.tools.selftest.subject import Subject
from pilotfish.tools.selftest.timing import device_seconds

HEADS, KV_HEADS = 32, 8
HEAD_DIMS = (64, 128, 256)
CASES: dict[str, tuple[int, int, int]] = {
    "decode, 512": (1, 512, 1),
    "decode, 8k": (1, 8192, 1),
    "decode, 32k": (1, 32768, 1),
    "decode, 128k": (1, 131071, 1),
    "verify 5 rows, 8k": (1, 8192, 5),
    "decode, 64 of 2k": (64, 2048, 1),
    "prompt of 2k": (1, 0, 2048),
    "chunk of 512 at 32k": (1, 32768, 512),
}
"""Sequences, tokens in the cache of each, rows of each."""
WHY = "rounding keys, values and weights of 128k tokens to 16 bits moves a mean of them by less than a hundredth"
CALLS = 8
"""Calls in a captured graph."""


def checks(subject: Subject) -> Iterator[Check]:
    for name in ("flash4", "flash2", "triton", "torch"):
        for dim in HEAD_DIMS if subject.device.type == "cuda" else HEAD_DIMS[:1]:
            compares = (
                "an attention call in a graph; values: keys and values read a second, largest difference to float32"
            )
            try:
                backend = choose_attention(name, _needs(subject, dim, 256 if name == "flash2" else 0), None)
            except ConfigError as error:
                yield Check(f"{name}, head_dim {dim}", compares, partial(skip, str(error)))
                continue
            cases = CASES if subject.device.type == "cuda" else {"decode, 64": (1, 64, 1)}
            for case, (count, start, rows) in cases.items():
                yield Check(
                    f"{name}, head_dim {dim}: {case}",
                    compares,
                    partial(timed, subject, backend, dim, count, start, rows),
                    "us",
                    WHY,
                )


def timed(subject: Subject, backend: AttentionBackend, dim: int, count: int, start: int, rows: int) -> Finding:
    """Time a call of `count` sequences of `rows` rows over `start` tokens, and compare a few of its rows."""
    if backend.name == "torch" and count > 8:
        raise Skip("it looks at each sequence by itself")
    device, size = subject.device, backend.block_size
    each = -(-(start + rows) // size)
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.randperm(count * each, generator=generator) + 1).tolist()
    spans = [Span([0] * rows, start, blocks[i * each : (i + 1) * each]) for i in range(count)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cache = backend.allocate(count * each + 1, size, KV_HEADS, dim, dtype, device)
    cache.keys.normal_()
    cache.values.normal_()
    batch = flatten(spans, size, device).attention
    qkv = torch.randn(count * rows, HEADS + 2 * KV_HEADS, dim, device=device, dtype=dtype)
    query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    params = AttentionParams(dim**-0.5)
    found = backend.attend(query, key, value, cache, batch, params)

    def calls() -> None:
        for _ in range(CALLS):
            backend.attend(query, key, value, cache, batch, params)

    action = calls
    if backend.capturable and device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        action = graph.replay
    seconds = device_seconds(device, action, 5)[0] / CALLS
    read = count * (start + rows) * 2 * KV_HEADS * dim * dtype.itemsize
    worst = max(_difference(query, cache, spans[0], size, row, found, dim) for row in {0, rows - 1})
    values = {"GB/s": read / seconds / 1e9, "largest difference": worst}
    detail = f"largest difference to float32: {worst:.2g}"
    return Finding(measured=1e6 * seconds if worst <= 0.05 else float("nan"), values=values, detail=detail)


def _difference(
    query: torch.Tensor, cache: LayerCache, span: Span, size: int, row: int, found: torch.Tensor, dim: int
) -> float:
    """The largest difference of a row of the first sequence to its definition in float32, (heads, dim)."""
    length = span.start + row + 1
    blocks = torch.tensor(span.blocks, device=query.device)
    keys, values = (part[blocks].flatten(0, 1)[:length].float() for part in (cache.keys, cache.values))
    grouped = query[row].float().view(KV_HEADS, HEADS // KV_HEADS, dim)
    weights = torch.einsum("ghd,ngd->ghn", grouped, keys).mul_(dim**-0.5).softmax(-1)
    right = torch.einsum("ghn,ngd->ghd", weights, values).reshape(HEADS, dim)
    return float((found[row].float().view(HEADS, dim) - right).abs().max())


def _needs(subject: Subject, dim: int, block_size: int) -> AttentionNeeds:
    own = subject.platform.needs
    dtype = torch.bfloat16 if subject.device.type == "cuda" else torch.float32
    return replace(own, dtype=dtype, cache_dtype=dtype, head_dim=dim, block_size=block_size)
