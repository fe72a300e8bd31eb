"""Attention by this package's own Triton kernels, wherever torch brings Triton and no flash-attn is installed.

Decode rows, verify spans and prefill chunks go in the same calls. Lengths and tables are read on the device alone, and
what is fixed on the host follows from the bounds of the batch, so that a captured pass may be replayed with other
lengths. A row's result has the same bits in every span of at most `SHORT` rows and in every batch: see
`triton_kernels`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton

from pilotfish.engine.kernels.dependent import for_rows, may_depend, options
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import allocate_paged, store_paged, write
from pilotfish.engine.layers.attention.triton_kernels import attend_spans, sum_parts

SHORT = 64
"""Most rows of a span whose context is cut into splits; longer ones keep the device busy by their rows."""

MOST_PARTS = 128 << 20
"""Bytes that the parts of a call may take. Beyond it, programs compute all splits of their rows, to the same bits."""

PROGRAMS = 16
"""Programs for each multiprocessor of the device, at which a context is not divided further."""

LOG2_E = math.log2(math.e)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, as in the tests, where there is no GPU."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut: results depend on it, and on nothing else of a launch."""

    rows: int
    """Rows of a tile of queries: each is a row of the batch and a head of the group."""
    keys: int
    """Keys of a tile."""
    split: int
    """Keys of each of the first splits."""
    warps: int
    stages: int


def short_tiling(group: int, padded: int, itemsize: int) -> Tiling:
    keys = max(16, min(128, 16384 // (padded * itemsize)))
    return Tiling(max(32, triton.next_power_of_2(group)), keys, split=128, warps=4, stages=2)


def long_tiling(group: int, padded: int, itemsize: int) -> Tiling:
    keys = max(16, min(64, 16384 // (padded * itemsize)))
    wide = padded * itemsize > 256
    rows = max(64 if wide else 128, triton.next_power_of_2(group))
    return Tiling(rows, keys, split=128, warps=4 if wide and rows == 64 else 8, stages=2)


class TritonAttention:
    """processors: multiprocessors of the device, over which long contexts are divided; dependent: whether kernels are
    launched before the one in front of them ends (`kernels.dependent`)."""

    name = "triton"
    block_size = 64
    capturable = True

    def __init__(self, processors: int, dependent: bool = False) -> None:
        self.processors, self._launch = processors, options(dependent)

    allocate = staticmethod(allocate_paged)
    store = staticmethod(store_paged)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        write(cache, key, value, batch.slots)
        rows, heads, dim = query.shape
        if query.stride(2) != 1 or query.stride(1) != dim:
            query = query.contiguous()
        kv_heads = cache.keys.shape[2]
        group, padded = heads // kv_heads, max(16, triton.next_power_of_2(dim))
        out = query.new_empty(rows, heads * dim)
        spans, longest, context = len(batch.query_lens), max(batch.query_lens), max(batch.contexts)
        tiling = short_tiling(group, padded, query.element_size())
        in_tile = tiling.rows // group
        several = longest > in_tile
        tiles = rows // in_tile + spans if several else spans
        seen = context if params.window is None else min(context, params.window + longest)
        splits = split_count(context, tiling.split)
        room = rows * heads * splits * (dim + 2) * 4
        divided = 1
        if seen > tiling.split and room <= MOST_PARTS:
            divided = min(split_count(seen, tiling.split) + 1, -(-PROGRAMS * self.processors // (tiles * kv_heads)))
        parts = stats = ranges = out  # stand in for tensors that nothing reads
        if divided > 1:
            parts = torch.empty(rows * heads * splits * dim, dtype=torch.float32, device=query.device)
            stats = torch.empty(rows * heads * splits * 2, dtype=torch.float32, device=query.device)
            ranges = torch.empty(rows, 2, dtype=torch.int32, device=query.device)

        softcap = params.softcap or 1.0

        def launch(tiling: Tiling, tiles: int, divided: int, search: bool, mode: str, shortest: int, most: int) -> None:
            attend_spans[(tiles, kv_heads, divided)](
                query,
                cache.keys,
                cache.values,
                out,
                parts,
                stats,
                ranges,
                batch.cu_query_lens,
                batch.context_lens,
                batch.block_tables,
                out if params.sinks is None else params.sinks,
                params.scale * LOG2_E,
                softcap * LOG2_E,
                params.scale / softcap,
                params.window or 0,
                spans,
                splits,
                query.stride(0),
                batch.block_tables.stride(0),
                HEADS=heads,
                GROUP=group,
                DIM=dim,
                PADDED=padded,
                BLOCK=batch.block_size,
                TILE=tiling.rows,
                KEYS=tiling.keys,
                SPLIT=tiling.split,
                SEARCH=search,
                WINDOWED=params.window is not None,
                SOFTCAPPED=bool(params.softcap),
                SINKS=params.sinks is not None,
                MODE=mode,
                RANGES=ranges is not out,
                SHORTEST=shortest,
                LONGEST=most,
                WIDEN=INTERPRETED,
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                **for_rows(self._launch, rows),
            )

        launch(tiling, tiles, divided, several, "parts" if divided > 1 else "fold", 1, SHORT)
        if longest > SHORT:
            tiling = long_tiling(group, padded, query.element_size())
            launch(tiling, rows // (tiling.rows // group) + spans, 1, True, "whole", SHORT + 1, 1 << 30)
        if divided > 1:
            sum_parts[(rows, heads)](
                out,
                parts,
                stats,
                ranges,
                out if params.sinks is None else params.sinks,
                splits,
                HEADS=heads,
                DIM=dim,
                PADDED=padded,
                SINKS=params.sinks is not None,
                AT_ONCE=8,
                num_warps=1,
                **for_rows(self._launch, rows),
            )
        return out


def split_count(context: int, split: int) -> int:
    """The number of splits of `context` keys: `triton_kernels.split_of` of the last, plus 1."""
    units = (context - 1) // split
    octave = max(0, units.bit_length() - 5)
    return 16 * octave + (units >> octave) + 1


def load_triton(device: torch.device) -> TritonAttention:
    """Return the backend for a device."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonAttention(processors, may_depend(device))
