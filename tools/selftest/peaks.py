"""Peaks: what this card gives at most, of bandwidth and of products, and what starting a kernel costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from pilotfish.engine.kernels.fp8 import multiply, prepare_fp8
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.subject import Subject
from pilotfish.tools.selftest.timing import device_seconds

GPU_SIZE, CPU_SIZE = 8192, 512
VECTOR_SHAPE = (14336, 4096)
"""The largest matrix of a layer of Llama-3.1-8B: (outputs, inputs)."""
KERNELS = 500


def checks(subject: Subject) -> Iterator[Check]:
    peaks = _Peaks(subject)
    yield Check("product, 16 bits", "a product of two large square matrices", peaks.product, "TFLOP/s")
    yield Check("product, fp8", "the same in fp8, row-wise scales", peaks.product_fp8, "TFLOP/s")
    for rows in (1, 5, 64):
        compares = "bytes of weights that products with matrices of a layer read, each from memory"
        yield Check(f"weights, {rows} rows", compares, partial(peaks.streamed, rows), "GB/s")
    yield Check("kernel in a graph", "a kernel on one number, replayed after others", peaks.replayed, "us")
    yield Check("kernel launched", "the same, launched one by one", peaks.launched, "us")


class _Peaks:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.device = subject, subject.device
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.size = GPU_SIZE if self.cuda else CPU_SIZE

    def product(self) -> Finding:
        left, right = (self._random(self.size, self.size) for _ in range(2))
        return self._rate(lambda: left @ right)

    def product_fp8(self) -> Finding:
        if not self.cuda or torch.cuda.get_device_capability(self.device) < (8, 9):
            raise Skip("products in fp8 take compute capability 8.9")
        (left, scale), (weight, weight_scale) = (quantize(self._random(self.size, self.size)) for _ in range(2))
        prepared = prepare_fp8(weight, None, weight_scale)
        return self._rate(lambda: multiply(left, scale, prepared, self.dtype))

    def streamed(self, rows: int) -> Finding:
        shape = VECTOR_SHAPE if self.cuda else (1024, 512)
        size = shape[0] * shape[1] * self.dtype.itemsize
        count = max(1, min(32 if self.cuda else 64, free_memory(self.device) // 4 // size))
        weights = [self._random(*shape) for _ in range(count)]
        inputs = self._random(rows, shape[1])

        def all_of_them() -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs, weight)

        seconds, _ = device_seconds(self.device, self._captured(all_of_them), 10)
        return Finding(measured=count * size / seconds / 1e9, detail=f"{count} matrices of {size >> 20} MiB")

    def replayed(self) -> Finding:
        if not self.cuda:
            raise Skip("there are no graphs on the CPU")
        return self._each(self._captured(self._small()))

    def launched(self) -> Finding:
        return self._each(self._small())

    def _small(self) -> Callable[[], None]:
        number = torch.zeros(1, device=self.device)

        def many() -> None:
            for _ in range(KERNELS):
                number.add_(1)

        return many

    def _each(self, many: Callable[[], object]) -> Finding:
        seconds, host = device_seconds(self.device, many, 10)
        return Finding(measured=1e6 * seconds / KERNELS, values={"host us": 1e6 * host / KERNELS})

    def _rate(self, product: Callable[[], object]) -> Finding:
        seconds, _ = device_seconds(self.device, product, 10)
        return Finding(measured=2 * self.size**3 / seconds / 1e12, detail=f"{self.size} x {self.size}")

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        if not self.cuda:
            return function
        function()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)
