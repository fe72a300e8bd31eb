"""Compares the Triton kernels with torch's operators on the device that they are to run on, before they are used.

A kernel that cannot be compiled there, or whose numbers are others, is computed by torch's operators instead: slower,
and a line in the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pilotfish.engine.kernels.dependent import may_depend
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.sampling.device_sampler import draw_keyed
from pilotfish.engine.sampling.noise import row_key
from pilotfish.engine.weights.fp8 import quantize

if TYPE_CHECKING:
    from pilotfish.engine.kernels.triton import TritonKernels

logger = logging.getLogger(__name__)

ROWS = 3
FEW, MANY, ONE = slice(0, ROWS), slice(0, 64), slice(1, 2)
"""Rows of products."""
BOUNDS = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}
"""Largest difference, in units in the last place of a number, or of its row's root mean square if that is larger. The
order of a norm's sum may move a number over the edge between two; numbers of 16 bits are rounded up to three times."""

EPS = 1e-5
Results = tuple[torch.Tensor, ...]
Trial = tuple[str, Callable[[], Results], Callable[[], Results]]
"""A kernel's name, its call, and torch's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What kernels are compiled for: a model's sizes, on this rank."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def checked_triton(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, sizes: Sizes, fp8: bool
) -> TorchKernels:
    """The Triton kernels without those that fail here; torch's if there is no Triton, or nothing of it is left. `fp8`:
    whether the device computes in it."""
    try:
        from pilotfish.engine.kernels.few import can_multiply
        from pilotfish.engine.kernels.triton import FUSED, TritonKernels

        dependent, few = may_depend(device), device if can_multiply(device) else None
        kernels = TritonKernels(dependent=dependent, few=few)
    except Exception as error:  # also what a broken installation raises
        logger.warning("kernels: torch's operators, since Triton cannot be used (%s)", _short(error))
        return TorchKernels()
    failed: set[str] = set()
    for name, mine, its in _trials(kernels, device, dtype, cache_dtype, sizes, fp8):
        if name not in failed and (reason := why_not(mine, its)):
            failed.add(name)
            logger.warning("kernels: torch's operators in the place of Triton's %r, %s", name, reason)
    return TorchKernels() if failed >= set(FUSED) else TritonKernels(failed, dependent, few)


def why_not(mine: Callable[[], Results], its: Callable[[], Results]) -> str | None:
    """Why the first cannot stand for the second, which is torch's; None if its numbers are the same, up to rounding."""
    wanted = its()
    try:
        found = mine()
        errors = [(_units(a, b), BOUNDS.get(b.dtype, 0.0)) for a, b in zip(found, wanted, strict=True)]
    except Exception as error:
        return f"which does not run here ({_short(error)})"
    worst, _ = max(errors, key=lambda pair: pair[0] - pair[1])
    if all(error <= bound for error, bound in errors):
        return None
    return f"whose numbers differ from theirs by up to {worst:.3g} units in the last place"


def _units(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; of whole numbers and fp8, how many differ. Infinite where there is a NaN."""
    a, b = found.double(), wanted.double()
    if wanted.dtype not in BOUNDS:
        return float((a != b).sum())
    size = torch.maximum(b.abs(), b.square().mean(-1, keepdim=True).sqrt()).clamp_(min=1e-30)
    worst = ((a - b).abs() / size).nan_to_num_(nan=torch.inf).max()
    return float(worst) / torch.finfo(wanted.dtype).eps


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _trials(
    kernels: TritonKernels,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sizes: Sizes,
    fp8: bool,
) -> Iterator[Trial]:
    from pilotfish.engine.kernels import triton

    generator, plain = torch.Generator().manual_seed(0), TorchKernels()

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    hidden, change = random(ROWS, sizes.hidden, scale=3.0), random(ROWS, sizes.hidden)
    weights = [1 + random(sizes.hidden), None, (1 + random(sizes.hidden)).float()]

    def norms(by: TorchKernels) -> Results:
        return by.rms_norm(hidden, 1 + change[0], EPS), by.rms_norm(qkv[:, :2], 1 + qkv[0, 0], EPS)

    def sums(by: TorchKernels) -> Results:
        every = [by.add_norm(hidden, change, post, weight, EPS) for post in weights for weight in weights]
        return tuple(each for pair in every for each in pair)

    qkv = random(ROWS, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    positions = torch.arange(ROWS, device=device)
    table = torch.randn(ROWS, sizes.head_dim, generator=generator).to(device)

    def rotations(by: TorchKernels, normed: bool) -> Results:
        shape = (ROWS, 1, sizes.kv_heads, sizes.head_dim)
        cache = torch.zeros(shape, device=device).to(cache_dtype), torch.zeros(shape, device=device).to(cache_dtype)
        weights = (1 + qkv[0, 0], 1 + qkv[0, 1]) if normed else None
        query = by.rotate_and_write(qkv.clone(), sizes.kv_heads, weights, positions, table, EPS, cache, positions)
        # Normed keys may be rounded to the next number of fp8.
        return query, *(each.float().to(dtype) for each in cache[cache_dtype.itemsize == 1 and normed :])

    gate_up = random(ROWS, 2 * sizes.intermediate, scale=3.0)
    logits = random(ROWS, sizes.vocab, scale=2.0)
    keys = torch.tensor([row_key(0, i) >> 1 for i in range(ROWS)], dtype=torch.int64).to(device)
    temperatures = torch.tensor([0.8] * (ROWS - 1) + [0.0], device=device)

    yield "rms_norm", lambda: norms(kernels), lambda: norms(plain)
    yield "add_norm", lambda: sums(kernels), lambda: sums(plain)
    for normed in (False, True):
        yield "rotate", partial(rotations, kernels, normed), partial(rotations, plain, normed)
    yield "gate", lambda: (kernels.silu_mul(gate_up),), lambda: (plain.silu_mul(gate_up),)
    yield "gate", lambda: (kernels.gelu_mul(gate_up),), lambda: (plain.gelu_mul(gate_up),)
    for wide in (hidden, gate_up) if fp8 else ():
        yield "quantize", partial(_scaled, triton.quantized, wide), partial(_scaled, quantize, wide)
    if "few" in kernels.used:
        yield from _products(kernels, device, dtype, sizes, fp8)
    yield "race", lambda: (triton.race(logits, keys, temperatures),), lambda: (draw_keyed(logits, keys, temperatures),)


def _scaled(by: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> Results:
    """The numbers in 16 bits. CUDA's division by a constant may be one unit off, which moves a number in a thousand to
    the next one of fp8."""
    numbers, scale = by(x)
    return scale.half(), (numbers.float() * scale).square().sum(1).to(torch.bfloat16)


def _products(
    kernels: TritonKernels, device: torch.device, dtype: torch.dtype, sizes: Sizes, fp8: bool
) -> Iterator[Trial]:
    """Of the products with few rows: their numbers, and whether a row has the same bits alone and among others."""
    plain, generator = TorchKernels(), torch.Generator(device).manual_seed(0)
    attended, hidden, inner = sizes.heads * sizes.head_dim, sizes.hidden, sizes.intermediate
    shapes: list[tuple[int, int, Gate | None]]
    shapes = [(attended + 2 * sizes.kv_heads * sizes.head_dim, hidden, None), (hidden, attended, None)]
    shapes += [(2 * inner, hidden, "silu"), (hidden, inner, None)]
    for outputs, depth, gate in shapes:
        x, weight = (torch.randn(rows, depth, generator=generator, device=device) for rows in (MANY.stop, outputs))
        weight.mul_(depth**-0.5)
        prepared = [plain.prepare_linear(weight.to(dtype))]
        if fp8 and not outputs % 16 and not depth % 16:
            stored, scale = quantize(weight)
            prepared.append(plain.prepare_linear(stored, None, scale))
        del weight
        for linear in prepared:
            of = partial(_product, linear, gate, x.to(dtype))
            yield "few", partial(of, kernels, FEW), partial(of, plain, FEW)
            yield "few", partial(_bits, of, kernels, MANY), partial(_bits, of, kernels, ONE)


def _product(linear: Any, gate: Gate | None, x: torch.Tensor, by: TorchKernels, rows: slice) -> Results:
    return (by.linear(x[rows], linear) if gate is None else by.gated_linear(x[rows], linear, gate),)


def _bits(of: Callable[[TorchKernels, slice], Results], by: TorchKernels, rows: slice) -> Results:
    """The bits of row 1's result, as whole numbers."""
    (result,) = of(by, rows)
    return (result[1 - rows.start].view(torch.int16 if result.itemsize == 2 else torch.int32),)
