"""Checks products with few rows (`engine.kernels.few`) on this GPU and times them over their tilings, beside torch's,
at Llama-3.1-8B's matrices: `python benchmarks/gpu/linear.py [--json FILE]`.

First all tilings are compiled, in processes of their own. Then, for each matrix, number of rows and dtype:

- units: the largest distance from float64, in units in the last place of a number or of its row's root mean square, and
  torch's;
- bits: how many numbers differ from those of the same rows among 64, by any tiling with as many splits;
- the three fastest tilings, and torch's product: microseconds and GB/s of weights, in a captured graph that reads each
  matrix from memory. "pdl" is programmatic dependent launch, "fetched" the bytes of each output's weights that a kernel
  asks for before it waits.

Last, a layer with what stands between its products, eight of them in a graph: with torch's products and these, with
and without dependent launches. Takes about 100 seconds; after --limit nothing more is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from pilotfish.engine.execution.batch import FlatBatch, Span, pack
from pilotfish.engine.kernels.dependent import options
from pilotfish.engine.kernels.few import Tiling, multiply, padded_rows
from pilotfish.engine.kernels.fp8 import multiply as multiply_fp8
from pilotfish.engine.kernels.fp8 import prepare_fp8
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.kernels.triton import TritonKernels, quantized
from pilotfish.engine.layers.attention.backend import AttentionParams, LayerCache
from pilotfish.engine.layers.attention.triton import TritonAttention
from pilotfish.engine.weights.fp8 import quantize

MATRICES = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""(outputs, inputs)"""
SPLITS = {"qkv": (1, 2, 4), "output": (1, 2, 4, 8), "gate_up": (1,), "down": (1, 2, 4, 8), "head": (1,)}
ROWS = (1, 5, 16, 32, 64)
MOST = max(ROWS)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SILU: dict[bool, Gate | None] = {False: None, True: "silu"}
CUDA = torch.device("cuda")
SHARED = 227 << 10
"""Bytes of shared memory that a program may take on Hopper."""
RESIDENT = 132 * 8
"""Programs that may be under way at a time, at most: a product of more splits than that is not tried."""
READ = 600 << 20
"""Bytes of weights that a graph reads at least, several times the L2 cache."""
HIDDEN, INNER, HEADS, KV_HEADS, DIM, EPS, LAYERS, CONTEXT = 4096, 14336, 32, 8, 128, 1e-5, 8, 512

# Outputs and bytes of a step's depth, stages, warps. Below 64 outputs the product is that of single warps.
SHAPES = (
    (64, 128, 8, 4),
    (64, 256, 3, 4),
    (64, 256, 4, 4),
    (64, 256, 5, 4),
    (64, 256, 10, 4),
    (128, 128, 4, 4),
    (128, 128, 6, 4),
    (128, 128, 11, 4),
    (128, 256, 3, 4),
    (128, 256, 6, 8),
    (256, 128, 5, 8),
    (256, 128, 6, 8),
    (32, 256, 6, 2),
    (16, 512, 6, 1),
)


@dataclass(frozen=True, slots=True)
class Timed:
    matrix: str
    dtype: str
    rows: int
    us: float
    gb_per_second: float
    pdl: bool = False
    gated: bool = False
    tiling: Tiling | None = None
    """None: torch's product."""


def tilings(matrix: str, rows: int, dtype: torch.dtype, gated: bool = False) -> Iterator[Tiling]:
    outputs, _ = MATRICES[matrix]
    for tile, depth, stages, warps in SHAPES:
        held = tile // 2 if gated else tile
        padded = padded_rows(rows)
        if stages * (tile + padded) * depth + 1024 > SHARED or (held < 64 and (gated or padded > 16 or dtype == FP8)):
            continue
        for splits in (1,) if gated else SPLITS[matrix]:
            programs = outputs // tile * splits
            if 80 <= programs <= RESIDENT * (10 if splits == 1 else 1):
                yield Tiling(held, depth // dtype.itemsize, splits, warps, stages)


def compiled(case: tuple[int, torch.dtype, bool, Tiling]) -> str | None:
    """Compile a tiling, by a small product; returns what went wrong."""
    rows, dtype, gated, tiling = case
    try:
        torch.cuda.init()
        depth, outputs = 2048 * max(1, tiling.splits), 512
        x, weight = (torch.zeros(n, depth, device=CUDA).to(dtype) for n in (rows, outputs))
        scales = (torch.ones(rows, device=CUDA), torch.ones(outputs, device=CUDA)) if dtype == FP8 else None
        arrived = torch.zeros(64, dtype=torch.int32, device=CUDA)
        for launch in (options(False), options(True)):
            multiply(x, weight, None, tiling, arrived, launch, scales=scales, dtype=BF16, gate=SILU[gated])
        torch.cuda.synchronize()
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error)[:300]}"
    return None


def compiled_rows(case: tuple[torch.dtype, bool]) -> None:
    """Compile the other kernels of a layer."""
    dtype, pdl = case
    with torch.inference_mode():
        chain = Chain(dtype, 1)
        for rows in (ROWS[0], ROWS[1], MOST):
            chain.run(rows, lambda matrix, rows: (None, False), False, pdl)()
        torch.cuda.synchronize()


def compile_all() -> set[tuple[int, torch.dtype, bool, Tiling]]:
    """Returns the tilings that cannot be used."""
    cases: dict[tuple[int, torch.dtype, bool, Tiling], None] = {}
    for matrix in MATRICES:
        for dtype in (BF16, FP8):
            for rows in ROWS:
                for gated in (False, True) if matrix == "gate_up" else (False,):
                    for tiling in tilings(matrix, rows, dtype, gated):
                        if tiling.splits > 1:
                            tiling = replace(tiling, splits=2)
                        cases[padded_rows(rows), dtype, gated, tiling] = None
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        others = pool.map(compiled_rows, [(dtype, pdl) for dtype in (BF16, FP8) for pdl in (False, True)])
        problems = list(pool.map(compiled, cases, chunksize=2))
        try:
            list(others)
        except Exception as error:
            print(f"other kernels: {type(error).__name__}: {str(error)[:300]}", flush=True)
    for problem in filter(None, problems):
        print("cannot be used:", problem, flush=True)
    print(f"{len(cases)} tilings compiled", flush=True)
    return {case for case, problem in zip(cases, problems, strict=True) if problem}


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[], Any], replays: int = 7) -> float:
    graph = captured(run)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def units(found: torch.Tensor, wanted: torch.Tensor) -> float:
    size = torch.maximum(wanted.abs(), wanted.square().mean(-1, keepdim=True).sqrt())
    worst = ((found.double() - wanted).abs() / size).nan_to_num_(nan=torch.inf).max()
    return float(worst) / torch.finfo(found.dtype).eps


class Matrix:
    """Copies of a matrix, and inputs."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype, (self.outputs, self.depth) = name, dtype, MATRICES[name]
        self.bytes = self.outputs * self.depth * dtype.itemsize
        generator = torch.Generator(CUDA).manual_seed(len(name))
        self.weights, self.scales, self.prepared = [], [], []
        self.x_scales: torch.Tensor | None = None
        for _ in range(max(2, -(-READ // self.bytes))):
            weight = torch.randn(self.outputs, self.depth, generator=generator, device=CUDA).mul_(0.02).to(BF16)
            if dtype == FP8:
                weight, scale = quantize(weight)
                self.scales.append(scale)
                self.prepared.append(prepare_fp8(weight, None, scale))
            self.weights.append(weight)
        self.plain = torch.randn(MOST, self.depth, generator=generator, device=CUDA).to(BF16)
        self.x = self.plain
        if dtype == FP8:
            self.x, self.x_scales = quantized(self.plain)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
        self.bits: dict[tuple[int, bool], torch.Tensor] = {}

    def ours(self, i: int, rows: int, tiling: Tiling, pdl: bool, gated: bool = False) -> torch.Tensor:
        scales = None if self.x_scales is None else (self.x_scales[:rows], self.scales[i])
        return multiply(
            *(self.x[:rows], self.weights[i], None, tiling, self.arrived, options(pdl)),
            scales=scales,
            dtype=BF16,
            gate=SILU[gated],
        )

    def torchs(self, i: int, rows: int) -> torch.Tensor:
        if self.x_scales is None:
            return torch.nn.functional.linear(self.x[:rows], self.weights[i])
        return multiply_fp8(self.x[:rows], self.x_scales[:rows], self.prepared[i], BF16)

    def exact(self) -> torch.Tensor:
        result = self.x.double() @ self.weights[0].double().T
        if self.x_scales is not None:
            result = result * self.x_scales.double() * self.scales[0].double().T
        return result

    def timed(self, rows: int, tiling: Tiling | None, pdl: bool, gated: bool = False) -> Timed:
        def run() -> None:
            for i in range(len(self.weights)):
                if tiling is None:
                    self.torchs(i, rows)
                else:
                    self.ours(i, rows, tiling, pdl, gated)

        us = microseconds(run) / len(self.weights)
        name = str(self.dtype).removeprefix("torch.")
        return Timed(self.name, name, rows, us, self.bytes / us / 1e3, pdl, gated, tiling)


def check(matrix: Matrix, unusable: set[Any]) -> dict[str, Any]:
    """Compare all tilings with float64, and with each other."""
    exact = matrix.exact()
    worst, differing, where = 0.0, 0, ""
    torchs = max(units(matrix.torchs(0, rows), exact[:rows]) for rows in ROWS)
    for rows in reversed(ROWS):
        for tiling in tilings(matrix.name, rows, matrix.dtype):
            if is_in(unusable, rows, matrix.dtype, False, tiling):
                continue
            for pdl in (False, True):
                found = matrix.ours(0, rows, tiling, pdl)
                error = units(found, exact[:rows])
                if error > worst:
                    worst, where = error, f"{rows} rows, {tiling}"
                key = (-(-matrix.depth // (256 * tiling.splits)) if tiling.splits > 1 else 0, tiling.outputs < 64)
                known = matrix.bits.setdefault(key, found)
                differing += int((known[:rows] != found).sum()) if len(known) >= rows else 0
        if matrix.name == "gate_up":
            whole = matrix.bits.get((0, False))
            wanted = None if whole is None else TritonKernels().silu_mul(whole[:rows])
            for tiling in tilings(matrix.name, rows, matrix.dtype, True):
                if wanted is not None and not is_in(unusable, rows, matrix.dtype, True, tiling):
                    found = matrix.ours(0, rows, tiling, True, True)
                    differing += int((wanted != found).sum())
    left = int(matrix.arrived.abs().sum())
    return {
        "matrix": matrix.name,
        "dtype": str(matrix.dtype),
        "units": worst,
        "units of torch": torchs,
        "differing": differing,
        "where": where,
        "counters left": left,
        "splits agree": {str(key): units(value, exact[: len(value)]) for key, value in matrix.bits.items()},
    }


def is_in(unusable: set[Any], rows: int, dtype: torch.dtype, gated: bool, tiling: Tiling) -> bool:
    return (padded_rows(rows), dtype, gated, replace(tiling, splits=min(2, tiling.splits))) in unusable


def times(matrix: Matrix, unusable: set[Any], over: Callable[[], bool]) -> list[Timed]:
    found: list[Timed] = []
    best: dict[bool, list[Tiling]] = {}
    for rows in (1, *ROWS[:0:-1]):
        found.append(matrix.timed(rows, None, False))
        for gated in (False, True) if matrix.name == "gate_up" else (False,):
            usable = [
                tiling
                for tiling in tilings(matrix.name, rows, matrix.dtype, gated)
                if not is_in(unusable, rows, matrix.dtype, gated, tiling)
            ]
            if rows in (5, 16):  # the tilings of 1 row: the fastest there
                usable = best[gated][:4]
            own = [] if over() else [matrix.timed(rows, tiling, True, gated) for tiling in usable]
            own.sort(key=lambda each: each.us)
            if rows == 1:
                best[gated] = [each.tiling for each in own if each.tiling is not None]
            for each in own[:2]:
                assert each.tiling is not None
                own.append(matrix.timed(rows, each.tiling, False, gated))
                for fetched in (512, 2048) if not over() else ():
                    own.append(matrix.timed(rows, replace(each.tiling, fetched=fetched), True, gated))
            found += own
    return found


def show(found: list[Timed]) -> None:
    for rows in ROWS:
        for gated in (False, True):
            own = sorted((each for each in found if each.rows == rows and each.gated == gated), key=lambda e: e.us)
            ours = [each for each in own if each.tiling is not None][:3]
            for each in [each for each in own if each.tiling is None] + ours:
                cut = each.tiling
                text = "torch"
                if cut is not None:
                    text = f"{cut.outputs} x {cut.depth}, {cut.splits} splits, {cut.stages} stages, {cut.warps} warps"
                    text += f", fetched {cut.fetched}" + ", pdl" * each.pdl + ", gated" * each.gated
                print(
                    f"{each.matrix:8} {each.dtype:13} {rows:3} {each.us:7.1f} us {each.gb_per_second:6.0f} GB/s  {text}"
                )


Choice = Callable[[str, int], tuple[Tiling | None, bool]]
"""The tiling for a matrix, by its name, and rows, and whether the activation is fused; None: torch's product."""


class Chain:
    """Layers in a row, with random weights."""

    def __init__(self, dtype: torch.dtype, layers: int = LAYERS) -> None:
        self.dtype = dtype
        names = [name for name in MATRICES if name != "head"]
        self.weights: list[dict[str, tuple[torch.Tensor, torch.Tensor | None]]] = []
        for _ in range(layers):
            layer: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
            for name in names:
                weight = torch.randn(*MATRICES[name], device=CUDA).mul_(0.02).to(BF16)
                layer[name] = quantize(weight) if dtype == FP8 else (weight, None)
            self.weights.append(layer)
        self.norm = torch.ones(HIDDEN, device=CUDA, dtype=BF16)
        self.table = torch.randn(4096, DIM, device=CUDA)
        self.given = torch.randn(MOST, HIDDEN, device=CUDA).to(BF16)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
        blocks = MOST * (CONTEXT // 64 + 2)
        self.cache = [torch.randn(blocks, 64, KV_HEADS, DIM, device=CUDA).to(BF16) for _ in range(2)]

    def run(self, rows: int, choice: Choice, pdl: bool, pdl_rows: bool) -> Callable[[], torch.Tensor]:
        """Return what computes a pass of as many sequences as rows."""
        kernels, attention = TritonKernels(dependent=pdl_rows), TritonAttention(132, pdl_rows)
        spans = [Span([1], CONTEXT, list(range(9 * i, 9 * i + 9)), 1) for i in range(rows)]
        arrays = pack(spans, 64).to(CUDA).arrays
        batch = FlatBatch.bounded(arrays, arrays.block_tables, 1, 8192, 64)
        cache = LayerCache(self.cache[0], self.cache[1])
        launch = options(pdl)

        def product(layer: dict[str, Any], name: str, x: torch.Tensor, gated: bool = False) -> torch.Tensor:
            weight, scale = layer[name]
            tiling, fused = choice(name, rows)
            if self.dtype == FP8:
                x, x_scale = quantized(x, options(pdl_rows))
                if tiling is None:
                    y = multiply_fp8(x, x_scale, prepare_fp8(weight, None, scale), BF16)
                else:
                    y = multiply(
                        *(x, weight, None, tiling, self.arrived, launch),
                        scales=(x_scale, scale),
                        dtype=BF16,
                        gate=SILU[gated and fused],
                    )
            elif tiling is None:
                y = torch.nn.functional.linear(x, weight)
            else:
                y = multiply(x, weight, None, tiling, self.arrived, launch, gate=SILU[gated and fused])
            return kernels.silu_mul(y) if gated and not fused else y

        def run() -> torch.Tensor:
            hidden, change = self.given[:rows].clone(), None
            for layer in self.weights:
                hidden, x = kernels.add_norm(hidden, change, None, self.norm, EPS)
                qkv = product(layer, "qkv", x).view(rows, HEADS + 2 * KV_HEADS, DIM)
                query = kernels.rotate_and_write(
                    *(qkv, KV_HEADS, None, arrays.positions, self.table, EPS),
                    *((cache.keys, cache.values), batch.attention.slots),
                )
                attended = attention.attend(query, None, None, cache, batch.attention, AttentionParams(DIM**-0.5))
                hidden, x = kernels.add_norm(hidden, product(layer, "output", attended), None, self.norm, EPS)
                change = product(layer, "down", product(layer, "gate_up", x, gated=True))
            return kernels.add_norm(hidden, change, None, None, EPS)[0]

        return run


def chains(dtype: torch.dtype, found: list[Timed]) -> list[dict[str, Any]]:
    chain = Chain(dtype)
    name = str(dtype).removeprefix("torch.")
    lines = []

    def best(matrix: str, rows: int, gated: bool, fetched: int) -> Tiling | None:
        own = [
            each
            for each in found
            if (each.matrix, each.dtype, each.rows, each.gated) == (matrix, name, rows, gated)
            and each.tiling is not None
            and each.tiling.outputs >= 64
        ]
        return replace(min(own, key=lambda each: each.us).tiling, fetched=fetched) if own else None  # type: ignore

    def choice(gated: bool, fetched: int, matrix: str, rows: int) -> tuple[Tiling | None, bool]:
        own = best(matrix, rows, gated and matrix == "gate_up", fetched)
        return own, own is not None and gated

    plain: Choice = lambda matrix, rows: (None, False)  # noqa: E731
    settings: list[tuple[str, Choice, bool, bool]] = [
        ("torch", plain, False, False),
        ("torch, other kernels dependent", plain, False, True),
        ("ours", partial(choice, False, 0), False, False),
        ("ours, gated", partial(choice, True, 0), False, False),
        ("ours, all dependent", partial(choice, False, 0), True, True),
        ("ours, gated, all dependent", partial(choice, True, 0), True, True),
        *((f"ours, gated, all dependent, fetched {n}", partial(choice, True, n), True, True) for n in (256, 512, 1024)),
        *((f"ours, gated, all dependent, fetched {n}", partial(choice, True, n), True, True) for n in (2048, 4096)),
    ]
    for rows in (ROWS[0], ROWS[1], MOST):
        results: dict[str, torch.Tensor] = {}
        for label, own, pdl, pdl_rows in settings:
            run = chain.run(rows, own, pdl, pdl_rows)
            us = microseconds(run, 11) / LAYERS
            first = run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = run()
            differing = 0
            for _ in range(20):
                graph.replay()
                differing += int((again != first).sum())
            results[label] = first
            reference = results["torch" if label.startswith("torch") else "ours"]
            line = {
                "chain": label,
                "dtype": name,
                "rows": rows,
                "us a layer": us,
                "replays differ": differing,
                "differ from plain": int((first != reference).sum()),
                "units from torch": units(first, results["torch"].double()),
            }
            lines.append(line)
            print(
                f"{name:13} {rows:3} rows {us:7.1f} us a layer  {label}; replays differ {differing}, from plain"
                f" {line['differ from plain']}, units from torch {line['units from torch']:.1f}",
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--limit", type=float, default=100.0, metavar="SECONDS")
    options_ = parser.parse_args()
    began = time.perf_counter()

    def seconds() -> float:
        return time.perf_counter() - began

    whole: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def save() -> None:
        whole["seconds"] = seconds()
        if options_.json:
            with open(options_.json, "w") as file:
                json.dump(whole, file, indent=1)

    unusable = compile_all()
    print(f"{seconds():.0f} s", flush=True)
    checks: list[dict[str, Any]] = []
    found: list[Timed] = []
    lines: list[dict[str, Any]] = []
    for dtype in (BF16, FP8):
        for name in MATRICES:
            if name == "head" and dtype == FP8:
                continue  # it stays in 16 bits
            try:
                matrix = Matrix(name, dtype)
                checks.append(check(matrix, unusable))
                print(checks[-1], flush=True)
                own = times(matrix, unusable, lambda: seconds() > 0.75 * options_.limit)
                show(own)
                found += own
                del matrix
            except Exception as error:
                print(f"{name} {dtype}: {type(error).__name__}: {str(error)[:500]}", flush=True)
                checks.append({"matrix": name, "dtype": str(dtype), "error": str(error)[:2000]})
            torch.cuda.empty_cache()
        print(f"{seconds():.0f} s", flush=True)
        whole |= {"checks": checks, "times": [asdict(each) for each in found], "chains": lines}
        save()
        try:
            lines += chains(dtype, found)
        except Exception as error:
            print(f"layers in {dtype}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        save()
    print(f"{seconds():.0f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
