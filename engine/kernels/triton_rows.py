"""The Triton kernels of `kernels.triton`: operators on rows between the matrix products of a layer, one launch each.

A program computes a row, a head of a row or a piece of a row, and never looks at others: a row has the same bits alone
and among any number of rows. All compute in float32 and round where torch's operators round. They are launched without
contraction of products and sums (`enable_fp_fusion=False`), of which torch's operators have none between them, and take
CUDA's own functions for exp, tanh and log. What can differ from torch's in the last bit: a norm, whose squares are
summed in another order, and GELU, in which torch's operator contracts.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether the kernels run in Triton's interpreter, which has not CUDA's functions, and rounds towards zero."""


@triton.jit
def follow(DEPENDENT: tl.constexpr):
    """If the kernel is launched before the one in front of it ends (CUDA's programmatic dependent launch): let the next
    one be launched, and wait for all that was launched before to end."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """x in this dtype, rounded to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == KIND and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(KIND)


@triton.jit
def as_stored(x, KIND: tl.constexpr):
    """x in the cache's dtype; what lies beyond fp8's largest number is cut off there."""
    if tl.float8e4nv == KIND:
        wide = x.to(tl.float32)
        # As torch's clamp, this leaves NaN as it is.
        wide = tl.where(wide > 448.0, 448.0, tl.where(wide < -448.0, -448.0, wide))
        if INTERPRETED:
            bits = wide.to(tl.int32, bitcast=True)
            exponent = tl.maximum(((bits >> 23) & 255) - 127, -6)
            eighths = tl.abs(wide) * ((130 - exponent) << 23).to(tl.float32, bitcast=True)
            eighths = ((eighths + 12582912.0) - 12582912.0).to(tl.int32)
            byte = ((exponent + 7) << 3) + eighths - 8 + ((bits >> 24) & 128)
            return tl.where(wide == wide, byte, 127).to(tl.uint8).to(KIND, bitcast=True)
        return wide.to(KIND)
    return rounded(x, KIND)


@triton.jit
def finite(x):
    """x with 0 for NaN, and the largest numbers of its dtype for what is infinite."""
    if x.dtype == tl.float16:
        most = 65504.0
    elif x.dtype == tl.bfloat16:
        most = 3.3895313892515355e38
    else:
        most = 3.4028234663852886e38
    wide = x.to(tl.float32)
    wide = tl.where(wide == wide, wide, 0.0)
    return tl.where(wide > most, most, tl.where(wide < -most, -most, wide)).to(x.dtype)


@triton.jit
def norm_row(x, weight, inside, size, eps):
    """x / sqrt(mean(x^2) + eps) * weight of a row, (BLOCK,) float32, which is 0 where not `inside`."""
    mean = tl.sum(x * x, 0) / size
    return x * tl.rsqrt(mean + eps) * tl.load(weight, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_norm_rows(
    hidden,  # (rows, size)
    change,  # (rows, size)
    post_weight,  # (size,)
    weight,  # (size,)
    total,  # (rows, size): hidden + change, or hidden + norm(change, post_weight)
    normed,  # (rows, size): norm(total, weight)
    hidden_stride,
    change_stride,
    size,
    eps,
    ADDED: tl.constexpr,  # whether there is a change
    POST: tl.constexpr,  # whether the change is normed
    NORMED: tl.constexpr,  # whether `normed` is wanted
    BLOCK: tl.constexpr,  # size, up to a power of two
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    kind = normed.dtype.element_ty
    x = tl.load(hidden + row * hidden_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        y = tl.load(change + row * change_stride + at, mask=inside, other=0.0).to(tl.float32)
        if POST:
            y = rounded(norm_row(y, post_weight + at, inside, size, eps), kind).to(tl.float32)
        x = rounded(x + y, kind)
        tl.store(total + row * size + at, x, mask=inside)
        x = x.to(tl.float32)
    if NORMED:
        tl.store(normed + row * size + at, rounded(norm_row(x, weight + at, inside, size, eps), kind), mask=inside)


@triton.jit
def norm_heads(
    x,  # (rows, heads, size)
    weight,  # (size,)
    out,  # (rows, heads, size), contiguous
    row_stride,
    head_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < size
    given = tl.load(x + row * row_stride + head * head_stride + at, mask=inside, other=0.0).to(tl.float32)
    to = out + (row * tl.num_programs(1) + head) * size + at
    tl.store(to, rounded(norm_row(given, weight + at, inside, size, eps), out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
    qkv,  # (rows, heads + 2 * kv_heads, DIM): queries and keys are changed in place
    q_norm,  # (DIM,)
    k_norm,
    positions,  # (rows,) int64
    cos_sin,  # (max_positions, DIM) float32
    keys,  # (slots, kv_heads, DIM), in the cache's dtype
    values,
    slots,  # (rows,) int64
    row_stride,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # DIM / 2, up to a power of two
    WHOLE: tl.constexpr,  # DIM, up to a power of two
    NORMED: tl.constexpr,  # whether queries and keys are normed first
    WRITTEN: tl.constexpr,  # whether keys and values go to the cache; else `qkv` has heads to rotate alone
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kind = qkv.dtype.element_ty
    base = qkv + row * row_stride + head * head_stride
    every = tl.arange(0, WHOLE)
    if head < HEADS + KV_HEADS:
        at = tl.arange(0, HALF)
        half: tl.constexpr = DIM // 2
        inside = at < half
        low = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(base + half + at, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            # Squares are summed in the order of `norm_heads`.
            x = tl.load(base + every, mask=every < DIM, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
            weight = q_norm
            if head >= HEADS:
                weight = k_norm
            low = low * factor * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            high = high * factor * tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)
            low = rounded(low, kind).to(tl.float32)
            high = rounded(high, kind).to(tl.float32)
        angle = cos_sin + tl.load(positions + row) * DIM + at
        cosine = tl.load(angle, mask=inside, other=0.0)
        sine = tl.load(angle + half, mask=inside, other=0.0)
        turned_low = rounded(low * cosine - high * sine, kind)
        turned_high = rounded(high * cosine + low * sine, kind)
        if WRITTEN and (head >= HEADS):
            to = keys + (tl.load(slots + row) * KV_HEADS + head - HEADS) * DIM
            tl.store(to + at, as_stored(turned_low, keys.dtype.element_ty), mask=inside)
            tl.store(to + half + at, as_stored(turned_high, keys.dtype.element_ty), mask=inside)
        else:
            tl.store(base + at, turned_low, mask=inside)
            tl.store(base + half + at, turned_high, mask=inside)
    else:
        to = values + (tl.load(slots + row) * KV_HEADS + head - HEADS - KV_HEADS) * DIM
        value = finite(tl.load(base + every, mask=every < DIM, other=0.0))  # see paged.write
        tl.store(to + every, as_stored(value, values.dtype.element_ty), mask=every < DIM)


@triton.jit
def activation(x, GELU: tl.constexpr):
    """GELU by its tanh approximation, or SiLU, of float32."""
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        if not INTERPRETED:
            tanh = libdevice.tanh(inner)
        else:
            shrunk = tl.exp(-2.0 * tl.abs(inner))
            tanh = (1.0 - shrunk) / (1.0 + shrunk)
            tanh = tl.where(inner < 0.0, -tanh, tanh)
        result = 0.5 * x * (1.0 + tanh)
    elif not INTERPRETED:
        result = tl.div_rn(x, 1.0 + libdevice.exp(-x))
    else:
        result = x / (1.0 + tl.exp(tl.minimum(-x, 88.0)))
    return result


@triton.jit
def gate_rows(
    gate_up,  # (rows, 2 * size), gate first
    out,  # (rows, size)
    row_stride,
    size,
    GELU: tl.constexpr,  # GELU by its tanh approximation, or SiLU
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kind = out.dtype.element_ty
    x = tl.load(gate_up + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + at, mask=inside, other=0.0).to(tl.float32)
    opened = rounded(activation(x, GELU), kind).to(tl.float32)
    tl.store(out + row * size + at, rounded(opened * up, kind), mask=inside)


@triton.jit
def quantize_rows(
    x,  # (rows, size)
    out,  # (rows, size) float8_e4m3fn
    scales,  # (rows,) float32
    row_stride,
    size,
    WHOLE: tl.constexpr,  # whether a block has all of a row
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,  # see `follow`
):
    """`weights.fp8.quantize`, to the bit of torch's operators on the CPU."""
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    largest = tl.zeros((BLOCK,), tl.float32)
    if WHOLE:
        given = tl.load(x + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
        largest = tl.abs(given)
    else:
        for start in range(0, size, BLOCK):
            given = tl.load(x + row * row_stride + start + at, mask=start + at < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(given))
    scale = tl.div_rn(tl.maximum(tl.max(largest, 0), 1e-12), 448.0)
    tl.store(scales + row, scale)
    divisor = tl.zeros((BLOCK,), tl.float32) + scale
    if WHOLE:
        tl.store(out + row * size + at, as_stored(tl.div_rn(given, divisor), tl.float8e4nv), mask=inside)
    else:
        for start in range(0, size, BLOCK):
            inside = start + at < size
            given = tl.load(x + row * row_stride + start + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row * size + start + at, as_stored(tl.div_rn(given, divisor), tl.float8e4nv), mask=inside)


@triton.jit
def log_exponential(high, low, tokens):
    """`sampling.noise.log_exponential` of one key's halves, int32 each, and token ids (BLOCK,) int32."""
    z = (tokens ^ low) * -312814405
    z = z ^ ((z >> 11) & 2097151)
    z = (z + high) * -1404298415
    z = z ^ ((z >> 15) & 131071)
    z = z * 830770091
    z = z ^ (z >> 14)
    # -(2**-31) * (1 - 2**-24), and 2**-32
    v = z.to(tl.float32) * -4.6566125955216364e-10 - 2.3283064365386963e-10
    if not INTERPRETED:
        return libdevice.log(-libdevice.log1p(v))
    wide = v.to(tl.float64)
    one = 1.0 + wide
    below = tl.where(one == 1.0, wide, tl.log(one) * wide / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.log((-below.to(tl.float32)).to(tl.float64)).to(tl.float32)


@triton.jit
def highest_of_pieces(
    logits,  # (rows, vocab)
    highest,  # (rows, pieces) float32
    row_stride,
    vocab,
    PIECE: tl.constexpr,  # columns of a piece
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    at = piece * PIECE + tl.arange(0, PIECE)
    given = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    tl.store(highest + row * tl.num_programs(1) + piece, tl.max(given, 0))


@triton.jit
def race_pieces(
    logits,  # (rows, vocab)
    highest,  # (rows, pieces) float32
    keys,  # (rows,) int64
    temperatures,  # (rows,) float32; 0: greedy
    scores,  # (rows, pieces) float32
    columns,  # (rows, pieces) int32
    row_stride,
    vocab,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,  # pieces, up to a power of two
    SCALED: tl.constexpr,  # whether logits are to be scaled: (logit - highest) / temperature
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    at = piece * PIECE + tl.arange(0, PIECE)
    given = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    key = tl.load(keys + row)
    noise = log_exponential((key >> 32).to(tl.int32), key.to(tl.int32), at)
    if SCALED:
        each = tl.arange(0, PIECES)
        top = tl.max(tl.load(highest + row * pieces + each, mask=each < pieces, other=float("-inf")), 0)
        temperature = tl.load(temperatures + row)
        divisor = tl.zeros((PIECE,), tl.float32) + tl.where(temperature == 0.0, 1.0, temperature)
        score = tl.div_rn(given - top, divisor) - noise
        score = tl.where(temperature == 0.0, given, score)
    else:
        score = given - noise
    score = tl.where(at < vocab, score, float("-inf"))
    best = tl.max(score, 0)
    tl.store(scores + row * pieces + piece, best)
    # The first of equals, as torch's argmax.
    tl.store(columns + row * pieces + piece, tl.min(tl.where(score == best, at, 2147483647), 0))


@triton.jit
def finish_race(
    scores,  # (rows, pieces) float32
    columns,  # (rows, pieces) int32
    tokens,  # (rows,) int64
    pieces,
    PIECES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # see `follow`
):
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, PIECES)
    there = each < pieces
    score = tl.load(scores + row * pieces + each, mask=there, other=float("-inf"))
    column = tl.load(columns + row * pieces + each, mask=there, other=2147483647)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, column, 2147483647), 0)
    # Nothing may be drawn of a row of -inf or nan alone: torch's argmax gives 0 or the first nan there.
    tl.store(tokens + row, tl.where(winner == 2147483647, 0, winner).to(tl.int64))
