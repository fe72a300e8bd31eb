"""Checks of attention over the paged cache: every backend that runs here against the definition, and cache writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import FP8, as_bytes, converted
from pilotfish.engine.layers.attention.choose import HALF, AttentionNeeds, choose_attention, why_not
from pilotfish.errors import ConfigError
from pilotfish.tools.selftest.check import Check, Finding, Skip, skip
from pilotfish.tools.selftest.precision import Worst
from pilotfish.tools.selftest.reference import ReferenceAttention
from pilotfish.tools.selftest.subject import Subject, short_name

BACKENDS = ("flash4", "flash2", "triton", "native", "torch")
BOUNDS = {torch.float32: 64.0, torch.float16: 6.0, torch.bfloat16: 6.0}
WHY = (
    "an answer is a mean of values of about 1, whose weights a kernel rounds to the model's dtype: 6 steps of that "
    "dtype next to 1; of float32, in which sums are rounded, too, 64"
)
FP8_BOUND, FP8_WHY = 40.0, "queries and weights are rounded to fp8 as well, in steps of 1/8 to 1/16: 0.3 in all"

Sequences = Sequence[tuple[int, int]]
"""(tokens in the cache, tokens of the span) of each sequence."""


@dataclass(frozen=True, slots=True)
class Case:
    """Batches of one kind, and the kinds of attention that they are computed with."""

    batches: Sequence[Sequences]
    ratios: Sequence[int] = (2,)
    """Query heads for each key-value head."""
    kv_heads: int = 2
    windows: Sequence[int | None] = (None,)
    softcap: float | None = None


MIXED: Sequences = ((0, 40), (129, 1), (77, 5), (300, 1), (16, 70), (511, 9))


def cases(block: int, ratio: int) -> dict[str, Case]:
    """Return the cases by name. block: tokens of a block; ratio: query heads for each key-value head of the model."""
    edges = [block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1]
    return {
        "prefill": Case([[(0, 1), (0, 33), (0, 150)], [(100, 64), (37, 29)]]),
        "decode": Case([[(0, 1), (7, 1), (300, 1), (1900, 1)], [(64, 1)] * 8]),
        "verify spans": Case([[(50, 2), (61, 3), (200, 5), (515, 9)], [(n, 5) for n in (3, 150, 261)]]),
        "mixed spans": Case([MIXED]),
        "block boundaries": Case([[(n, 1) for n in edges], [(n - 3, 5) for n in edges], [(0, n) for n in edges[:3]]]),
        "sliding window": Case([MIXED, [(n, 1) for n in edges]], windows=(1, 24, block, 4096)),
        "grouped heads": Case([MIXED], ratios=sorted({1, 3, 4, 8, ratio}), kv_heads=1),
        "soft-capping": Case([MIXED], softcap=5.0),
    }


def checks(subject: Subject) -> Iterator[Check]:
    dtypes = [subject.platform.dtype]
    if subject.device.type == "cuda" and not subject.quick:
        dtypes += [dtype for dtype in HALF if dtype not in dtypes]
    for name in BACKENDS:
        for dtype in dtypes:
            yield from _checks(subject, name, dtype)


def _checks(subject: Subject, name: str, dtype: torch.dtype) -> Iterator[Check]:
    needs = replace(subject.platform.needs, dtype=dtype, cache_dtype=dtype, block_size=subject.config.block_size)
    kernels = subject.platform.kernels

    def check(what: str, why: str, run: Callable[[], Finding]) -> Check:
        compares = f"attention by {name} on {subject.device} with its definition in float64"
        return Check(what, compares, run, "units of the dtype next to 1", why)

    try:
        found = choose_attention(name, needs, kernels if isinstance(kernels, NativeKernels) else None)
    except ConfigError as error:
        reason = str(error).partition(", but ")[2] or str(error)
        yield check(f"{name}, {short_name(dtype)}", "", partial(skip, reason))
        return
    backend = _Backend(subject, found, replace(needs, block_size=needs.block_size or found.block_size))
    prefix = f"{name}{' (in use)' if name == subject.platform.attention.name else ''}, {short_name(dtype)}"
    shape = subject.shape
    for what, case in cases(backend.needs.block_size, shape.num_heads // shape.num_kv_heads).items():
        yield check(f"{what}, {prefix}", WHY, partial(backend.compare, case, dtype))
    why = FP8_WHY if name == "flash4" else WHY
    yield check(f"fp8 cache, {prefix}", why, partial(backend.compare, Case([MIXED]), FP8))
    for cache_dtype in (torch.bfloat16, torch.int8) if name == "native" else ():
        where = f"cache in {short_name(cache_dtype)}, {prefix}"
        yield check(where, WHY, partial(backend.compare, Case([MIXED]), cache_dtype))
    compares = "what lies in the cache after a step with what was written, and the rest with what was there"
    copied = "keys and values are copied: nothing is rounded"
    yield Check(f"cache write, {prefix}", compares, backend.written, "wrong rows", copied)


@dataclass(frozen=True)
class _Backend:
    """An attention backend in one dtype."""

    subject: Subject
    backend: AttentionBackend
    needs: AttentionNeeds

    def compare(self, case: Case, cache_dtype: torch.dtype) -> Finding:
        """Compare the case's batches with the definition; the cache is in `cache_dtype`."""
        name, dtype = self.backend.name, self.needs.dtype
        if case.softcap and name == "native":
            raise Skip("the native kernels have no soft-capping, and no model that they compute needs it")
        if reason := why_not(name, replace(self.needs, cache_dtype=cache_dtype)):
            raise Skip(reason)
        worst = Worst()
        for sequences in case.batches[:1] if self.subject.quick else case.batches:
            for ratio in case.ratios:
                for window in case.windows:
                    where = f"{list(sequences)}, {ratio} heads for each of keys, window {window}"
                    worst.add(self._error(sequences, case, ratio, window, cache_dtype), where)
        return worst.finding(FP8_BOUND if cache_dtype == FP8 and name == "flash4" else BOUNDS[dtype])

    def _error(
        self, sequences: Sequences, case: Case, ratio: int, window: int | None, cache_dtype: torch.dtype
    ) -> float:
        dtype = self.needs.dtype
        kv_heads, dim, size = case.kv_heads, self.needs.head_dim, self.needs.block_size
        heads = kv_heads * ratio
        blocks, steps = _laid_out(sequences, size)
        cache = self.backend.allocate(blocks, size, kv_heads, dim, cache_dtype, self.subject.device)
        reference = ReferenceAttention()
        exact = reference.allocate(blocks, size, kv_heads, dim, torch.float64, torch.device("cpu"))
        params = AttentionParams(dim**-0.5, window, case.softcap)
        found = wanted = torch.empty(0)
        for number, spans in enumerate(steps):
            if not spans:
                continue
            here = flatten(spans, size, self.subject.device).attention
            there = flatten(spans, size, torch.device("cpu")).attention
            qkv = self.subject.random(len(there.slots), heads + 2 * kv_heads, dim, seed=number, dtype=dtype)
            # Views of one tensor, as in models.
            query, key, value = qkv.to(self.subject.device).split((heads, kv_heads, kv_heads), dim=1)
            found = self.backend.attend(query, key, value, cache, here, params)
            query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
            key, value = (_kept(part, cache_dtype).double() for part in (key, value))
            if spans is steps[0]:  # its results are not compared
                reference.store(key, value, exact, there)
            else:
                wanted = reference.attend(query.double(), key, value, exact, there, params)
        if found.dtype != dtype or found.shape != wanted.shape:
            raise ValueError(f"attention returned {found.dtype} {tuple(found.shape)}, not {dtype} {wanted.shape}")
        return float((found.cpu().double() - wanted).abs().max()) / torch.finfo(dtype).eps

    def written(self) -> Finding:
        """Compare the cache after a step, bit by bit."""
        dtype = self.needs.dtype
        size, dim, kv_heads = self.needs.block_size, self.needs.head_dim, 2
        blocks, (_, spans) = _laid_out(MIXED, size)
        cache = self.backend.allocate(blocks, size, kv_heads, dim, dtype, self.subject.device)
        before = [self.subject.random(*part.shape, seed=9, dtype=dtype) for part in (cache.keys, cache.values)]
        cache.keys.copy_(before[0])
        cache.values.copy_(before[1])
        batch = flatten(spans, size, self.subject.device).attention
        qkv = self.subject.random(len(batch.slots), 4 + 2 * kv_heads, dim, seed=1, dtype=dtype)
        query, key, value = qkv.to(self.subject.device).split((4, kv_heads, kv_heads), dim=1)
        self.backend.attend(query, key, value, cache, batch, AttentionParams(dim**-0.5))
        wrong = 0
        for stored, was, rows in zip(
            _rows(cache), _rows(LayerCache(*before)), qkv.split((4, 2, 2), dim=1)[1:], strict=True
        ):
            wanted = was.clone()
            wanted[batch.slots.cpu()] = rows
            wrong += int((as_bytes(stored.cpu()) != as_bytes(wanted)).flatten(1).any(1).sum())
        return Finding(measured=wrong, bound=0, detail=f"of {2 * blocks * size}")


def _kept(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a cache in `dtype` keeps of keys or values, (rows, kv_heads, head_dim)."""
    if dtype != torch.int8:
        return converted(rows, dtype)
    most = rows.abs().amax(-1, keepdim=True)
    return torch.round(rows * (127 / most)) * (most / 127)


def _rows(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values by slot, (slots, kv_heads, head_dim); the native cache stores keys by dimension."""
    keys = cache.keys if cache.keys.shape == cache.values.shape else cache.keys.permute(0, 3, 1, 2)
    return keys.flatten(0, 1), cache.values.flatten(0, 1)


def _laid_out(sequences: Sequences, block_size: int) -> tuple[int, tuple[list[Span], list[Span]]]:
    """Return the number of blocks, used in random order, and the spans of two steps: one fills the cache, the other is
    compared."""
    needed = [-(-(start + length) // block_size) for start, length in sequences]
    free = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(7)).tolist()
    total = len(free)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    filled = [Span([0] * start, 0, table) for (start, _), table in zip(sequences, tables, strict=True) if start]
    asked = [Span([0] * length, start, table) for (start, length), table in zip(sequences, tables, strict=True)]
    return total, (filled, asked)
