"""Checks of operators: each set of kernels that runs here, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt
from typing import Any

import torch

from pilotfish.engine.kernels.native import VECTOR, NativeKernels, load_library
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.engine.weights.fp8 import SCHEME
from pilotfish.tools.selftest.check import Check, Finding, Skip, skip
from pilotfish.tools.selftest.precision import Worst, units
from pilotfish.tools.selftest.reference import ReferenceKernels
from pilotfish.tools.selftest.subject import Subject, short_name

EPS = 1e-5
OUTPUTS = 512
"""Most outputs of a matrix that are compared, since the reference is slow."""

FEW = {torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}
"""Units in the last place for a row-wise operator."""
ROW_WHY = (
    "computed in float32 and rounded once or twice: 2 units in the last place of a 16-bit number; of float32 itself "
    "16, as sums and exponentials are rounded on the way"
)
SUM_WHY = (
    "a sum of n products is rounded n times in float32 (2 sqrt(n) units of it), and the result, with its residual, a "
    "few times (8 units, which leaves room for partial sums in 16 bits)"
)

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor, str]]
"""An operator's results, the reference's in float64, and a description of the inputs."""


def checks(subject: Subject) -> Iterator[Check]:
    for kernels, dtype in _sets(subject):
        yield from _Operators(subject, kernels, dtype).checks()
    if subject.device.type == "cpu" and load_library() is None:
        missing = partial(skip, "they were not built: no C compiler at installation")
        yield Check("native kernels", "this package's CPU kernels with the formulas in float64", missing)


def _sets(subject: Subject) -> Iterator[tuple[Kernels[Any], torch.dtype]]:
    """Yield the chosen kernels first, then the others that run here, and other dtypes."""
    platform = subject.platform
    yield platform.kernels, platform.dtype
    if isinstance(platform.kernels, NativeKernels):
        yield TorchKernels(), torch.float32
    elif platform.device.type == "cpu" and load_library() is not None:
        yield NativeKernels(), torch.float32
    if not subject.quick:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype not in (platform.dtype, torch.float32 if platform.device.type == "cpu" else None):
                yield TorchKernels(), dtype


class _Operators:
    """The operators of one set of kernels in one dtype, on random rows of the model's sizes."""

    def __init__(self, subject: Subject, kernels: Kernels[Any], dtype: torch.dtype) -> None:
        self.subject, self.device, self.shape = subject, subject.device, subject.shape
        self.kernels, self.dtype = kernels, dtype
        self.native = isinstance(kernels, NativeKernels)
        self.reference = ReferenceKernels()
        self.rows = (5,) if subject.quick else (1, 5, 33)

    def checks(self) -> Iterator[Check]:
        few, sums = FEW[self.dtype], self._sum_bound(self.dtype)
        yield self._check("rms_norm", self.rms_norm, few, ROW_WHY)
        yield self._check("rotate", self.rotate, few, ROW_WHY)
        for name in ("silu_mul", "gelu_mul"):
            yield self._check(name, partial(self.gate, name), few, ROW_WHY)
        yield self._check("embed", self.embed, 0.0, "rows are copied: nothing is rounded")
        yield self._check("linear", self.linear, sums, SUM_WHY)
        if isinstance(self.kernels, TorchKernels):
            # On CUDA the product comes in bfloat16 whatever the model's dtype is.
            rounded = self.dtype if self.subject.platform.needs.capability is None else torch.bfloat16
            why = SUM_WHY + "; the reference rounds its inputs to fp8, too"
            yield self._check("linear, fp8 weights", self.fp8, self._sum_bound(rounded), why, rounded)

    def _check(
        self, name: str, operator: Callable[[], Pairs], bound: float, why: str, rounded: torch.dtype | None = None
    ) -> Check:
        def run() -> Finding:
            worst = Worst()
            for found, wanted, where in operator():
                worst.add(units(found, wanted, rounded or self.dtype), where)
            return worst.finding(bound)

        by = self.kernels.name
        compares = f"{name} by the {by} kernels on {self.device}, with the formula in float64"
        return Check(f"{name}, {by}, {short_name(self.dtype)}", compares, run, "units in the last place", why)

    def _sum_bound(self, rounded: torch.dtype) -> float:
        return 2 * sqrt(max((inputs for inputs, _ in self._matrices()), default=0)) if rounded == torch.float32 else 8.0

    def rms_norm(self) -> Pairs:
        head_dim = self.shape.head_dim
        weight_dtype = torch.float32 if self.native else self.dtype
        for rows in self.rows:
            for size in self._sizes(self.shape.hidden_size, 64):
                x = 3 * self._random(rows, size, seed=rows)
                weight = 1 + self.subject.random(size, seed=1, dtype=weight_dtype)
                found = self.kernels.rms_norm(x.to(self.device), weight.to(self.device), EPS)
                yield found, self.reference.rms_norm(x, weight, EPS), f"{rows} rows of {size}"
            # A strided view of heads in a qkv matrix, as in models that normalize queries and keys.
            qkv = self._random(rows, 6, head_dim, seed=rows)
            if self._sizes(head_dim):
                weight = 1 + self.subject.random(head_dim, seed=2, dtype=weight_dtype)
                found = self.kernels.rms_norm(qkv.to(self.device)[:, 1:4], weight.to(self.device), EPS)
                yield found, self.reference.rms_norm(qkv[:, 1:4], weight, EPS), f"{rows} rows of heads"

    def rotate(self) -> Pairs:
        last = min(4096, self.shape.max_position)
        for dim in self._sizes(self.shape.head_dim, 64):
            table = cos_sin_table(self.shape.rope, dim, last)
            for rows in self.rows:
                x = self._random(rows, 6, dim, seed=rows)
                positions = torch.arange(rows) * 7919 % last
                positions[-1] = last - 1
                found, wanted = x.to(self.device, copy=True), x.double()
                self.kernels.rotate_(found[:, :5], positions.to(self.device), table.to(self.device))
                self.reference.rotate_(wanted[:, :5], positions, table)
                yield found, wanted, f"{rows} rows, head_dim {dim}"

    def gate(self, name: str) -> Pairs:
        for rows in self.rows:
            for size in self._sizes(self.shape.intermediate_size, 64):
                x = 4 * self._random(rows, 2 * size, seed=rows)
                found = getattr(self.kernels, name)(x.to(self.device))
                yield found, getattr(self.reference, name)(x), f"{rows} rows of {size}"

    def embed(self) -> Pairs:
        weight = self._random(1000, 256, seed=3)
        ids = torch.arange(33) * 613 % 1000
        found = self.kernels.embed(ids.to(self.device), self.kernels.prepare_linear(weight.to(self.device)))
        yield found, weight[ids].double(), "33 rows of 256"

    def linear(self) -> Pairs:
        for inputs, outputs in self._matrices():
            weight = self._random(outputs, inputs, seed=4) * inputs**-0.5
            bias = self._random(outputs, seed=5)
            for biased in (bias, None):
                on_device = None if biased is None else biased.to(self.device)
                prepared = self.kernels.prepare_linear(weight.to(self.device), on_device)
                exact = self.reference.prepare_linear(weight, biased)
                for rows in self.rows:
                    x, residual = self._random(rows, inputs, seed=rows), self._random(rows, outputs, seed=rows + 50)
                    found = self.kernels.linear(x.to(self.device), prepared, residual.to(self.device, copy=True))
                    yield found, self.reference.linear(x, exact, residual), f"{rows} rows, {inputs} to {outputs}"

    def fp8(self) -> Pairs:
        capability = self.subject.platform.needs.capability
        if reason := SCHEME.why_not(capability):
            raise Skip(f"fp8 {reason}")
        for inputs, outputs in self._matrices():
            weight, scale = SCHEME.quantize(self.subject.random(outputs, inputs, seed=6) * inputs**-0.5)
            prepared = self.kernels.prepare_linear(weight.to(self.device), None, scale.to(self.device))
            exact = self.reference.prepare_linear(weight, None, scale)
            for rows in self.rows:
                x = self._random(rows, inputs, seed=rows)
                found = self.kernels.linear(x.to(self.device), prepared)
                yield found, self.reference.linear(x, exact), f"{rows} rows, {inputs} to {outputs}"

    def _random(self, *shape: int, seed: int) -> torch.Tensor:
        return self.subject.random(*shape, seed=seed, dtype=self.dtype)

    def _sizes(self, *sizes: int) -> list[int]:
        """Return those of `sizes` that the kernels support."""
        return [size for size in dict.fromkeys(sizes) if not self.native or size % VECTOR == 0]

    def _matrices(self) -> Iterator[tuple[int, int]]:
        """Yield the (inputs, outputs) of the model's matrices, with at most OUTPUTS outputs."""
        shape = self.shape
        queries = shape.num_heads * shape.head_dim
        heads = queries + 2 * shape.num_kv_heads * shape.head_dim
        for inputs, outputs in {
            (shape.hidden_size, heads),
            (queries, shape.hidden_size),
            (shape.hidden_size, 2 * shape.intermediate_size),
            (shape.intermediate_size, shape.hidden_size),
        }:
            if inputs % VECTOR == 0:
                yield inputs, min(outputs, OUTPUTS) // VECTOR * VECTOR
