"""The Triton kernel of `kernels.few`: products of a matrix with few rows, which take as long as the matrix is read.

A program multiplies a tile of TILE outputs with up to ROWS rows, over one of the splits of the matrix's depth. The
tile of weights is the left factor of the tensor cores' product and the rows are its columns, so that rows need not be
padded to 64. Splits are summed by the last program of a tile that arrives, in their own order.

A row's result has the same bits alone and among any number of rows, and for all TILE, DEPTH and ROWS: each output is
summed from 0 in steps of 16 numbers (32 in fp8, where sums of 128 are added in float32: the tensor cores of Hopper
keep fewer bits), within splits that follow from the matrix alone.

With DEPENDENT the kernel may be launched before the one in front of it ends (CUDA's programmatic dependent launch): it
asks for its first weights to be brought to the cache, and then waits for what it reads or overwrites. The next kernel
is launched as its sums end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pilotfish.engine.kernels.triton_rows import activation, rounded

EXACT = tl.constexpr(128)
"""Products in fp8 that are summed by the tensor cores before they are added in float32."""


@triton.jit
def fetch(address, size):
    """Ask for so many bytes from each address, a multiple of 16, to be brought to the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows"])
def multiply_few(
    x,  # descriptor of (rows, depth), in blocks of (ROWS, DEPTH)
    weight,  # descriptor of (outputs, depth), or (2 * outputs, depth) if GATED, in blocks of (TILE, DEPTH)
    start,  # weight's address
    scales,  # (rows,) float32, of rows in fp8
    weight_scales,  # (outputs,) float32, of a matrix in fp8
    bias,  # (outputs,)
    out,  # (rows, outputs), contiguous
    parts,  # (tiles, splits, TILE, ROWS) float32
    arrived,  # (tiles,) int32: 0 before and after
    rows,
    outputs,
    depth,
    split,  # of the depth, a multiple of DEPTH
    fetched,  # bytes of each output's weights that are brought to the cache if DEPENDENT, a multiple of 16
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,  # rows, up to 16, 32 or 64
    DIVIDED: tl.constexpr,  # whether there are several splits
    GATED: tl.constexpr,  # whether activation(gate) * up is wanted of a matrix that has all gates first
    GELU: tl.constexpr,  # whether that is GELU, not SiLU
    SCALED: tl.constexpr,  # whether the numbers are in fp8, with scales
    BIASED: tl.constexpr,
    DEPENDENT: tl.constexpr,  # see above
    WIDEN: tl.constexpr,  # whether products take their factors as float32: Triton's interpreter knows no bfloat16
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)
    begin = part * split
    kind = out.dtype.element_ty
    if DEPENDENT:
        if (fetched > 0) & (begin + fetched // (start.dtype.element_ty.primitive_bitwidth // 8) <= depth):
            row = tl.minimum(n, outputs - 1).to(tl.int64)
            fetch(start + row * depth + begin, fetched)
            if GATED:
                fetch(start + (row + outputs) * depth + begin, fetched)
        gdc_wait()
    total = tl.zeros((TILE, ROWS), tl.float32)
    up = tl.zeros((TILE, ROWS), tl.float32)
    for k in range(begin, tl.minimum(begin + split, depth), DEPTH):
        given = x.load([0, k])
        left = weight.load([tile * TILE, k])
        total = product(left, given, total, SCALED, WIDEN)
        if GATED:
            up = product(weight.load([tile * TILE + outputs, k]), given, up, SCALED, WIDEN)
    if DEPENDENT:
        # Not earlier: the next product's programs would settle where this one leaves room, two here and none there.
        gdc_launch_dependents()
    m = tl.arange(0, ROWS)
    if DIVIDED:
        splits = tl.num_programs(1)
        place = tl.arange(0, TILE)[:, None] * ROWS + m[None, :]
        there = (m < rows)[None, :] & (n < outputs)[:, None]
        own = parts + tile * splits * (TILE * ROWS) + place
        tl.store(own + part * (TILE * ROWS), total, mask=there, cache_modifier=".cg")
        tl.debug_barrier()  # all of the program's stores are before its arrival
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:
            total = tl.zeros((TILE, ROWS), tl.float32)
            for i in range(splits):
                total += tl.load(own + i * (TILE * ROWS), mask=there, other=0.0, cache_modifier=".cg")
            finish(total, up, scales, weight_scales, bias, out, m, n, rows, outputs, kind, GATED, GELU, SCALED, BIASED)
            tl.store(arrived + tile, 0)
    else:
        finish(total, up, scales, weight_scales, bias, out, m, n, rows, outputs, kind, GATED, GELU, SCALED, BIASED)


@triton.jit
def product(left, given, total, SCALED: tl.constexpr, WIDEN: tl.constexpr):
    """total + left @ given.T: (TILE, DEPTH), (ROWS, DEPTH) -> (TILE, ROWS) float32."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), given.to(tl.float32).T, total, input_precision="ieee")
    if SCALED:
        return tl.dot(left, given.T, total, max_num_imprecise_acc=EXACT)
    return tl.dot(left, given.T, total)


@triton.jit
def finish(
    total, up, scales, weight_scales, bias, out, m, n, rows, outputs, kind: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Scale, add the bias, round as torch's operators do one by one, and store (TILE, ROWS) to (rows, outputs)."""
    total = finished(total, scales, weight_scales, bias, m, n, rows, outputs, 0, kind, SCALED, BIASED)
    if GATED:
        up = finished(up, scales, weight_scales, bias, m, n, rows, outputs, outputs, kind, SCALED, BIASED)
        opened = rounded(activation(total.to(tl.float32), GELU), kind)
        total = rounded(opened.to(tl.float32) * up.to(tl.float32), kind)  # as `triton_rows.gate_rows` does
    there = (m < rows)[None, :] & (n < outputs)[:, None]
    tl.store(out + m.to(tl.int64)[None, :] * outputs + n[:, None], total, mask=there)


@triton.jit
def finished(
    total, scales, weight_scales, bias, m, n, rows, outputs, offset, kind: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    if SCALED:
        own = tl.load(scales + m, mask=m < rows, other=0.0)
        each = tl.load(weight_scales + offset + n, mask=n < outputs, other=0.0)
        total = total * own[None, :] * each[:, None]
    if BIASED:
        added = tl.load(bias + offset + n, mask=n < outputs, other=0.0).to(tl.float32)
        if SCALED:
            total = rounded(total, kind).to(tl.float32)
        total = total + added[:, None]
    return rounded(total, kind)
