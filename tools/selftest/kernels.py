"""The operators between a model's matrices, each set of kernels that could be used here, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any

import torch

from pilotfish.engine.kernels.fp8 import FP8_CAPABILITY, quantize_rows
from pilotfish.engine.kernels.native import VECTOR, NativeKernels, load_library
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.precision import Worst, units
from pilotfish.tools.selftest.reference import ReferenceKernels
from pilotfish.tools.selftest.subject import Subject

GROUP = "kernels"
EPS = 1e-5
OUTPUTS = 512
"""Most outputs of a matrix that are looked at: the reference is slow."""

FEW = {torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}
"""Units in the last place for an operator that goes row by row."""
ROW_WHY = (
    "computed in float32 and rounded once or twice: 2 units in the last place of a 16-bit number; of float32 itself "
    "16, as sums and exponentials are rounded on the way"
)
SUM_WHY = (
    "a sum of n products is rounded n times in float32 (2 sqrt(n) units of it), and the result, with its residual, a "
    "few times (8 units, which leaves room for partial sums in 16 bits)"
)

Operator = Callable[[Kernels[Any], torch.dtype, Worst], float]
"""Adds the operator's errors; returns the bound."""


def checks(subject: Subject) -> Iterator[Check]:
    operators: dict[str, tuple[Operator, str]] = {
        "rms_norm": (_Operators(subject).rms_norm, ROW_WHY),
        "rotate": (_Operators(subject).rotate, ROW_WHY),
        "silu_mul": (_Operators(subject).silu_mul, ROW_WHY),
        "gelu_mul": (_Operators(subject).gelu_mul, ROW_WHY),
        "embed": (_Operators(subject).embed, "rows are copied: nothing is rounded"),
        "linear": (_Operators(subject).linear, SUM_WHY),
        "linear, fp8 weights": (_Operators(subject).fp8, SUM_WHY + "; the reference rounds its inputs to fp8, too"),
    }
    for kernels, dtype in _sets(subject):
        for name, (operator, why) in operators.items():
            if "fp8" in name and not isinstance(kernels, TorchKernels):
                continue
            yield Check(
                group=GROUP,
                name=f"{name}, {kernels.name}, {_short(dtype)}",
                compares=f"{name} by the {kernels.name} kernels on {subject.device}, with the formula in float64",
                unit="units in the last place",
                why=why,
                run=_runner(operator, kernels, dtype),
            )
    if subject.device.type == "cpu" and load_library() is None:
        yield Check(
            group=GROUP,
            name="native kernels",
            compares="this package's CPU kernels with the formulas in float64",
            unit="",
            why="",
            run=_missing,
        )


def _sets(subject: Subject) -> Iterator[tuple[Kernels[Any], torch.dtype]]:
    """The chosen kernels first; then the others that compute here, and other dtypes."""
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


def _runner(operator: Operator, kernels: Kernels[Any], dtype: torch.dtype) -> Callable[[], Finding]:
    @torch.inference_mode()
    def run() -> Finding:
        worst = Worst()
        bound = operator(kernels, dtype, worst)
        return worst.finding(bound)

    return run


def _missing() -> Finding:
    raise Skip("they were not built: no C compiler at installation")


class _Operators:
    """Each operator on random rows of the model's sizes."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.device, self.shape = subject, subject.device, subject.shape
        self.reference = ReferenceKernels()
        self.rows = (5,) if subject.quick else (1, 5, 33)

    def sizes(self, kernels: Kernels[Any], *sizes: int) -> list[int]:
        """Those, but what the native kernels can have of them."""
        return [size for size in dict.fromkeys(sizes) if not isinstance(kernels, NativeKernels) or size % VECTOR == 0]

    def rms_norm(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        shape = self.shape
        weight_dtype = torch.float32 if isinstance(kernels, NativeKernels) else dtype
        for rows in self.rows:
            for size in self.sizes(kernels, shape.hidden_size, 64):
                x = 3 * self.subject.random(rows, size, seed=rows, dtype=dtype)
                weight = 1 + self.subject.random(size, seed=1, dtype=weight_dtype)
                found = kernels.rms_norm(x.to(self.device), weight.to(self.device), EPS)
                worst.add(units(found, self.reference.rms_norm(x, weight, EPS), dtype), f"{rows} rows of {size}")
            # Heads of a qkv matrix's rows, as a view with strides: what models with norms of queries and keys pass on.
            qkv = self.subject.random(rows, 6, shape.head_dim, seed=rows, dtype=dtype)
            if self.sizes(kernels, shape.head_dim):
                weight = 1 + self.subject.random(shape.head_dim, seed=2, dtype=weight_dtype)
                found = kernels.rms_norm(qkv.to(self.device)[:, 1:4], weight.to(self.device), EPS)
                wanted = self.reference.rms_norm(qkv[:, 1:4], weight, EPS)
                worst.add(units(found, wanted, dtype), f"{rows} rows of heads")
        return FEW[dtype]

    def rotate(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        shape, last = self.shape, min(4096, self.shape.max_position)
        for dim in self.sizes(kernels, shape.head_dim, 64):
            table = cos_sin_table(shape.rope, dim, last)
            for rows in self.rows:
                x = self.subject.random(rows, 6, dim, seed=rows, dtype=dtype)
                positions = torch.arange(rows) * 7919 % last
                positions[-1] = last - 1
                found, wanted = x.to(self.device, copy=True), x.double()
                kernels.rotate_(found[:, :5], positions.to(self.device), table.to(self.device))
                self.reference.rotate_(wanted[:, :5], positions, table)
                worst.add(units(found, wanted, dtype), f"{rows} rows, head_dim {dim}")
        return FEW[dtype]

    def silu_mul(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        return self._gate(kernels, kernels.silu_mul, self.reference.silu_mul, dtype, worst)

    def gelu_mul(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        return self._gate(kernels, kernels.gelu_mul, self.reference.gelu_mul, dtype, worst)

    def _gate(
        self,
        kernels: Kernels[Any],
        operator: Callable[[torch.Tensor], torch.Tensor],
        reference: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        worst: Worst,
    ) -> float:
        for rows in self.rows:
            for size in self.sizes(kernels, self.shape.intermediate_size, 64):
                x = 4 * self.subject.random(rows, 2 * size, seed=rows, dtype=dtype)
                worst.add(units(operator(x.to(self.device)), reference(x), dtype), f"{rows} rows of {size}")
        return FEW[dtype]

    def embed(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        weight = self.subject.random(1000, 256, seed=3, dtype=dtype)
        ids = torch.arange(33) * 613 % 1000
        found = kernels.embed(ids.to(self.device), kernels.prepare_linear(weight.to(self.device)))
        worst.add(units(found, weight[ids].double(), dtype), "33 rows of 256")
        return 0.0

    def linear(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        deepest = 0
        for inputs, outputs in self._matrices(kernels):
            weight = self.subject.random(outputs, inputs, seed=4, dtype=dtype) * inputs**-0.5
            bias = self.subject.random(outputs, seed=5, dtype=dtype)
            deepest = max(deepest, inputs)
            for biased in (bias, None):
                prepared = kernels.prepare_linear(
                    weight.to(self.device), None if biased is None else biased.to(self.device)
                )
                exact = self.reference.prepare_linear(weight, biased)
                for rows in self.rows:
                    x = self.subject.random(rows, inputs, seed=rows, dtype=dtype)
                    residual = self.subject.random(rows, outputs, seed=rows + 50, dtype=dtype)
                    found = kernels.linear(x.to(self.device), prepared, residual.to(self.device, copy=True))
                    wanted = self.reference.linear(x, exact, residual)
                    worst.add(units(found, wanted, dtype), f"{rows} rows, {inputs} to {outputs}")
        return 2 * sqrt(deepest) if dtype == torch.float32 else 8.0

    def fp8(self, kernels: Kernels[Any], dtype: torch.dtype, worst: Worst) -> float:
        capability = self.subject.platform.needs.capability
        if capability is not None and capability < FP8_CAPABILITY:
            raise Skip(f"products in fp8 need compute capability 8.9, and this is {capability[0]}.{capability[1]}")
        # On CUDA the product comes in bfloat16 whatever the model's dtype is.
        rounded = torch.bfloat16 if capability is not None else dtype
        deepest = 0
        for inputs, outputs in self._matrices(kernels):
            weight, scale = quantize_rows(self.subject.random(outputs, inputs, seed=6) * inputs**-0.5)
            prepared = kernels.prepare_linear(weight.to(self.device), None, scale.to(self.device))
            exact = self.reference.prepare_linear(weight, None, scale)
            deepest = max(deepest, inputs)
            for rows in self.rows:
                x = self.subject.random(rows, inputs, seed=rows, dtype=dtype)
                found = kernels.linear(x.to(self.device), prepared)
                wanted = self.reference.linear(x, exact)
                worst.add(units(found, wanted, rounded), f"{rows} rows, {inputs} to {outputs}")
        return 2 * sqrt(deepest) if rounded == torch.float32 else 8.0

    def _matrices(self, kernels: Kernels[Any]) -> Iterator[tuple[int, int]]:
        """(inputs, outputs) of the model's matrices, less outputs where they are many."""
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
