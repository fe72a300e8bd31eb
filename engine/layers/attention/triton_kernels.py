"""The Triton kernels of `attention.triton`: attention over the paged cache, and the sum over the parts of a context.

A program attends a tile of query rows, all the query heads of one key-value head in it, to some of the keys. Keys are
cut into splits at fixed positions, whatever the batch: 16 splits of SPLIT keys, then 16 for each doubling, so that a
split is at most a 16th of the context before it. Each split is computed from nothing and folded into the result in
ascending order, either in the program itself or, where splits are divided over programs, by `sum_parts`. What a row
cannot see changes nothing, to the last bit, so a row's result depends neither on the other rows of its tile nor on
how many programs share its context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pilotfish.engine.kernels.triton_rows import follow

OCTAVES = tl.constexpr(16)
"""Most doublings of the context after the first 32 splits."""


@triton.jit
def split_of(position, SPLIT: tl.constexpr):
    """The number of the split that has the key at `position`."""
    units = position // SPLIT
    octave = units * 0
    for doubling in tl.static_range(1, OCTAVES + 1):
        octave += ((units >> (4 + doubling)) > 0).to(tl.int32)
    return 16 * octave + (units >> octave)


@triton.jit
def split_start(number, SPLIT: tl.constexpr):
    """The position of the first key of a split."""
    octave = tl.maximum(number // 16 - 1, 0)
    return ((number - 16 * octave) << octave) * SPLIT


@triton.jit
def fold(most, total, part_most, part_total):
    """Return the factors of a softmax-weighted sum and of a part to be added to it, and the new maximum and total.

    Where the part has no keys (its maximum is -inf), the sum's bits stay as they are. Products are fused explicitly, so
    that every kernel rounds in the same way.
    """
    new = tl.maximum(most, part_most)
    safe = tl.where(new == float("-inf"), 0.0, new)
    kept, added = tl.exp2(most - safe), tl.exp2(part_most - safe)
    return kept, added, new, tl.fma(part_total, added, total * kept)


@triton.jit
def attend_spans(
    query,  # (rows, heads, DIM)
    keys,  # (blocks, BLOCK, kv_heads, DIM)
    values,
    out,  # (rows, heads * DIM)
    parts,  # (rows, heads, splits, DIM) float32: unnormalized sums of each split
    stats,  # (rows, heads, splits, 2) float32: maximum (base 2) and sum of the weights
    ranges,  # (rows, 2) int32: first and last split of a row whose result is in `parts`; 0, -1 if it is in `out`
    cu_query_lens,
    context_lens,
    block_tables,
    sinks,  # (heads,): see AttentionParams
    scale,  # of scores, times log2(e)
    softcap,  # times log2(e)
    inverse_softcap,  # scale / softcap
    window,
    spans,
    splits,
    query_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key-value head
    DIM: tl.constexpr,
    PADDED: tl.constexpr,  # DIM, up to a power of two
    BLOCK: tl.constexpr,  # tokens of a block
    TILE: tl.constexpr,  # rows of the tile of queries, a power of two
    KEYS: tl.constexpr,  # keys of a tile
    SPLIT: tl.constexpr,
    SEARCH: tl.constexpr,  # whether a span may have several tiles
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SINKS: tl.constexpr,  # whether there are sinks
    MODE: tl.constexpr,  # "parts", "fold" or "whole"
    RANGES: tl.constexpr,  # whether `ranges` are wanted
    SHORTEST: tl.constexpr,  # lengths of the spans that this launch computes
    LONGEST: tl.constexpr,
    WIDEN: tl.constexpr,  # whether products take their factors as float32: Triton's interpreter knows no bfloat16
    DEPENDENT: tl.constexpr,  # see `triton_rows.follow`
):
    follow(DEPENDENT)
    ROWS: tl.constexpr = TILE // GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if SEARCH:
        # The tiles of span i begin at cu_query_lens[i] // ROWS + i.
        low = 0
        high = spans
        while low < high:
            middle = (low + high) // 2
            if tl.load(cu_query_lens + middle) // ROWS + middle <= tile:
                low = middle + 1
            else:
                high = middle
        span = low - 1
        start = tl.load(cu_query_lens + span)
        first = (tile - start // ROWS - span) * ROWS
    else:
        span = tile
        start = tl.load(cu_query_lens + span)
        first = 0
    length = tl.load(cu_query_lens + span + 1) - start
    if (first < length) & (length >= SHORTEST) & (length <= LONGEST):
        context = tl.load(context_lens + span)
        before = context - length
        member = tl.arange(0, TILE)
        row = first + member // GROUP
        valid = (member < ROWS * GROUP) & (row < length)
        head = kv_head * GROUP + member % GROUP
        position = before + row  # the last key that a row sees
        dims = tl.arange(0, PADDED)
        there = valid[:, None] if PADDED == DIM else valid[:, None] & (dims < DIM)[None, :]
        at = (start + row).to(tl.int64)
        q = tl.load(query + (at * query_stride + head * DIM)[:, None] + dims[None, :], mask=there, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)

        last = before + tl.minimum(first + ROWS, length) - 1
        lowest = tl.maximum(before + first - window + 1, 0) if WINDOWED else 0
        if RANGES and (kv_head == 0) & (tl.program_id(2) == 0):
            one = valid & (member % GROUP == 0)
            if MODE == "parts":
                least = tl.maximum(position - window + 1, 0) if WINDOWED else position * 0
                tl.store(ranges + at * 2, split_of(least, SPLIT), mask=one)
                tl.store(ranges + at * 2 + 1, split_of(position, SPLIT), mask=one)
            else:
                tl.store(ranges + at * 2, position * 0, mask=one)
                tl.store(ranges + at * 2 + 1, position * 0 - 1, mask=one)

        offset = tl.arange(0, KEYS)
        table = block_tables + span.to(tl.int64) * table_stride
        result = tl.zeros((TILE, PADDED), tl.float32)
        result_most = tl.full((TILE,), float("-inf"), tl.float32)
        result_total = tl.zeros((TILE,), tl.float32)
        if SINKS:  # a weight is there before any key, without a value
            result_most = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            result_total = result_total + 1.0
        if MODE == "whole":
            first_split = 0
            stop_split = 1
        else:
            first_split = split_of(lowest, SPLIT) + tl.program_id(2)
            stop_split = split_of(last, SPLIT) + 1
        for number in tl.range(first_split, stop_split, tl.num_programs(2), num_stages=1):
            if MODE == "whole":
                begin = lowest // KEYS * KEYS
                end = last + 1
            else:
                begin = tl.maximum(split_start(number, SPLIT), lowest // KEYS * KEYS)
                end = tl.minimum(split_start(number + 1, SPLIT), last + 1)
            acc = tl.zeros((TILE, PADDED), tl.float32)
            most = tl.full((TILE,), float("-inf"), tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            if SINKS and MODE == "whole":
                most = result_most
                total = result_total
            for key in tl.range(begin, end, KEYS):
                seen = key + offset
                inside = seen < end
                if BLOCK % KEYS == 0:
                    block = tl.load(table + key // BLOCK).to(tl.int64)
                    slot = block * BLOCK + (key % BLOCK + offset)
                else:
                    block = tl.load(table + seen // BLOCK, mask=inside, other=0).to(tl.int64)
                    slot = block * BLOCK + seen % BLOCK
                where = (slot * KV_HEADS + kv_head) * DIM
                k_there = inside[None, :] if PADDED == DIM else inside[None, :] & (dims < DIM)[:, None]
                v_there = inside[:, None] if PADDED == DIM else inside[:, None] & (dims < DIM)[None, :]
                k = tl.load(keys + where[None, :] + dims[:, None], mask=k_there, other=0.0)
                v = tl.load(values + where[:, None] + dims[None, :], mask=v_there, other=0.0)
                scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
                if SOFTCAPPED:
                    # tanh(x) = 1 - 2 / (e^2x + 1)
                    grown = tl.exp2(scores * inverse_softcap * 2.8853900817779268)
                    scores = softcap * (1.0 - 2.0 / (grown + 1.0))
                else:
                    scores = scores * scale
                visible = valid[:, None] & (seen[None, :] <= position[:, None])
                if WINDOWED:
                    visible = visible & (seen[None, :] > (position - window)[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                new = tl.maximum(most, tl.max(scores, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                weights = tl.exp2(scores - safe[:, None])
                kept = tl.exp2(most - safe)
                total = tl.fma(total, kept, tl.sum(weights, 1))
                acc = acc * kept[:, None]
                weights = weights.to(query.dtype.element_ty)
                acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
                most = new
            if MODE == "parts":
                part = (at * HEADS + head) * splits + number
                tl.store(parts + (part * DIM)[:, None] + dims[None, :], acc, mask=there)
                tl.store(stats + part * 2, most, mask=valid)
                tl.store(stats + part * 2 + 1, total, mask=valid)
            elif MODE == "fold":
                kept, added, result_most, result_total = fold(result_most, result_total, most, total)
                result = tl.fma(acc, tl.broadcast_to(added[:, None], (TILE, PADDED)), result * kept[:, None])
            else:
                result = acc
                result_total = total
        if MODE != "parts":
            result = result / tl.where(result_total == 0.0, 1.0, result_total)[:, None]
            to = out + (at * (HEADS * DIM) + head * DIM)[:, None] + dims[None, :]
            tl.store(to, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def sum_parts(
    out,  # (rows, heads * DIM)
    parts,
    stats,
    ranges,
    sinks,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SINKS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # splits whose loads are under way together
    DEPENDENT: tl.constexpr,  # see `triton_rows.follow`
):
    """Fold a row's splits in ascending order: a program for each row and head."""
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.maximum(tl.load(ranges + row * 2), 0)
    last = tl.minimum(tl.load(ranges + row * 2 + 1), splits - 1)
    if last >= first:
        dims = tl.arange(0, PADDED)
        base = (row * HEADS + head) * splits
        result = tl.zeros((PADDED,), tl.float32)
        most = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        one = tl.arange(0, 1)
        if SINKS:
            most = tl.load(sinks + head + one).to(tl.float32) * 1.4426950408889634
            total = total + 1.0
        for group in tl.range(first, last + 1, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                number = group + i
                there = number <= last
                at = base + number
                part = tl.load(parts + at * DIM + dims, mask=there & (dims < DIM), other=0.0)
                part_most = tl.load(stats + at * 2 + one, mask=there & (one == 0), other=float("-inf"))
                part_total = tl.load(stats + at * 2 + 1 + one, mask=there & (one == 0), other=0.0)
                kept, added, most, total = fold(most, total, part_most, part_total)
                result = tl.fma(part, tl.broadcast_to(added, (PADDED,)), result * kept)
        result = result / tl.where(total == 0.0, 1.0, total)
        to = out + row * (HEADS * DIM) + head * DIM + dims
        tl.store(to, result.to(out.dtype.element_ty), mask=dims < DIM)
