"""Products of a matrix with few rows, in 16 bits or fp8, by `triton_products.multiply_few`, cut as a `Tiling` says.

How often a matrix is split follows from its sizes alone, and results depend on nothing else of the tiling: a row has
the same bits alone and among up to MOST_ROWS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from pilotfish.engine.kernels import triton_products
from pilotfish.engine.kernels.fp8 import Fp8Linear
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.kernels.torch import TorchLinear

MOST_ROWS = 64

MOST_TILES = 4096
"""Tiles of a matrix that is split, at most."""

TILE = 64
"""Outputs of a tile, the least of the tensor cores' products for four warps."""

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""

WANTED = 96
"""Programs that a product is cut into, at the least: 96 tiles are faster whole than each in two."""

SHARED = 111 << 10
"""Bytes of shared memory for a program's stages, so that two find room in a multiprocessor."""

FETCHED = 4 << 20
"""Bytes of a matrix that are asked for before a product waits: what is read while a small kernel in front ends. More
would be in the way of what is under way."""

SMALLEST = 1 << 20
"""Bytes of the smallest matrix that is taken. Below it, a product takes no longer than its launch."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernel runs in Triton's interpreter, as in the tests, where there is no GPU."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut. Results depend on `splits` and on nothing else of it."""

    outputs: int
    """Outputs of a tile, a power of two; of the gate, and as many more of what it multiplies, where that is fused."""
    depth: int
    """Numbers of each output's weights that are multiplied at a time, a power of two of at least 128 in fp8."""
    splits: int = 1
    """Parts of the depth that are summed by themselves."""
    warps: int = 4
    stages: int = 4
    """Steps of `depth` that are under way at a time."""
    fetched: int = 0
    """Bytes of each output's weights that a kernel asks for before it waits for the one in front of it."""


def can_multiply(device: torch.device) -> bool:
    """Whether the tilings are made for this device: compute capability 9.x, Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


class FewRows:
    """Computes linears with up to MOST_ROWS rows on a device, where the tilings know their matrices."""

    def __init__(self, device: torch.device, launch: Mapping[str, Any]) -> None:
        """launch: how the kernels around are launched, `dependent.options`."""
        self._fp8 = launch
        # In 16 bits programs that settle before the one in front has ended are spread unevenly at times, which costs
        # more than a launch: the kernel behind it is launched early, and itself is not.
        self._wide = {**launch, "launch_pdl": False} if launch["DEPENDENT"] else launch
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)

    def takes(self, x: torch.Tensor, weight: torch.Tensor, gate: Gate | None) -> Tiling | None:
        """How x (rows, depth) is multiplied with a matrix (outputs, depth); None: not by this kernel."""
        rows, depth = x.shape
        outputs = len(weight) // (1 if gate is None else 2)
        row_bytes = depth * weight.element_size()
        if not 0 < rows <= MOST_ROWS or outputs % 16 or row_bytes % 16 or weight.element_size() > 2:
            return None
        if len(weight) * row_bytes < SMALLEST:
            return None
        tiling = tiling_of(outputs, row_bytes, weight.element_size(), padded_rows(rows), gate is not None)
        return None if tiling.splits > 1 and triton.cdiv(outputs, tiling.outputs) > MOST_TILES else tiling

    def linear(self, x: torch.Tensor, weight: TorchLinear, tiling: Tiling, gate: Gate | None) -> torch.Tensor:
        """See `Kernels.linear` and `gated_linear`."""
        return multiply(by_rows(x), weight.weight, weight.bias, tiling, self._arrived, self._wide, gate=gate)

    def fp8_linear(
        self,
        quantized: tuple[torch.Tensor, torch.Tensor],
        weight: Fp8Linear,
        tiling: Tiling,
        gate: Gate | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The same of rows in fp8 with scales (rows, 1) float32; the result is in `dtype`."""
        x, scales = quantized
        both = (scales, weight.scale)
        return multiply(x, weight.weight, weight.bias, tiling, self._arrived, self._fp8, both, dtype, gate)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """x (rows, depth) itself where the kernel can load its rows."""
    aligned = x.is_contiguous() and x.storage_offset() * x.element_size() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def tiling_of(outputs: int, row_bytes: int, itemsize: int, padded: int, gated: bool) -> Tiling:
    """The tiling for a matrix with rows of `row_bytes`, and rows of x that are padded to `padded`: the fastest, or
    nearly so, of those that benchmarks/gpu/linear.py tried on an H200."""
    step = 128 if gated and padded > 16 else 256
    splits, tiles = 1, -(-outputs // TILE)
    while not gated and splits < 8 and tiles * splits < WANTED and row_bytes >= 2048 * splits:
        splits *= 2
    room = SHARED if tiles * splits > PROCESSORS else 2 * SHARED
    stages = min(5 if step == 256 else 8, room // ((TILE * (2 if gated else 1) + padded) * step))
    fetched = min(FETCHED // (outputs * splits * (2 if gated else 1)), row_bytes // splits) // 16 * 16
    return Tiling(TILE, step // itemsize, splits, 4, stages, fetched)


def padded_rows(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


def split_of(depth: int, tiling: Tiling) -> int:
    """Numbers in each part of the depth but the last."""
    return -(-depth // (tiling.splits * 256)) * 256 if tiling.splits > 1 else -(-depth // 256) * 256


def multiply(
    x: torch.Tensor,  # (rows, depth), contiguous
    weight: torch.Tensor,  # (outputs, depth), contiguous, in x's dtype; if there is a gate, that first
    bias: torch.Tensor | None,  # (outputs,)
    tiling: Tiling,
    arrived: torch.Tensor,  # (at least the tiles,) int32, of zeros, of nothing else that is computed meanwhile
    launch: Mapping[str, Any],  # see `dependent`
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,  # float32, of x's rows and the weight's: both in fp8
    dtype: torch.dtype | None = None,  # of the result; x's by default
    gate: Gate | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias: (rows, outputs), or the gate of its first half times the second: (rows, outputs / 2)."""
    (rows, depth), outputs = x.shape, len(weight) // (1 if gate is None else 2)
    padded, split = padded_rows(rows), split_of(depth, tiling)
    tiles, splits = triton.cdiv(outputs, tiling.outputs), triton.cdiv(depth, split)
    out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    parts = out  # stands in for what nothing reads
    if splits > 1:
        parts = torch.empty(tiles * splits * tiling.outputs * padded, dtype=torch.float32, device=x.device)
    own, each = scales if scales is not None else (out, out)
    triton_products.multiply_few[(tiles, splits)](
        TensorDescriptor(x, [rows, depth], [depth, 1], [padded, tiling.depth]),
        TensorDescriptor(weight, [len(weight), depth], [depth, 1], [tiling.outputs, tiling.depth]),
        weight,
        own,
        each,
        out if bias is None else bias,
        out,
        parts,
        arrived,
        rows,
        outputs,
        depth,
        split,
        min(tiling.fetched, split * weight.element_size()),
        TILE=tiling.outputs,
        DEPTH=tiling.depth,
        ROWS=padded,
        DIVIDED=splits > 1,
        GATED=gate is not None,
        GELU=gate == "gelu",
        SCALED=scales is not None,
        BIASED=bias is not None,
        WIDEN=INTERPRETED,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=False,
        **launch,
    )
    return out
