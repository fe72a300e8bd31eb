"""Compares the Triton kernels on rows with torch's operators on this GPU, and times both, at Llama-3.1-8B's shapes:
`python benchmarks/gpu/fused.py [--json FILE]`.

A line for each kernel and number of rows: microseconds of both in a captured graph (CUDA events around replays), the
share of numbers that differ, by how many units in the last place at most, and how many rows have other bits among 64
than alone. Takes under 90 seconds, most of them for compiling.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from pilotfish.engine.kernels import triton as fused
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.kernels.triton import TritonKernels
from pilotfish.engine.sampling.device_sampler import draw_keyed
from pilotfish.engine.sampling.noise import as_int64, key_halves, log_exponential, row_key
from pilotfish.engine.weights.fp8 import quantize

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
ROWS = (1, 5, 64)
CALLS = 20
"""Calls in a captured graph."""
REPLAYS = 30
EPS = 1e-5
CUDA = torch.device("cuda")
TRITON, TORCH = TritonKernels(), TorchKernels()

Results = tuple[torch.Tensor, ...]
Call = Callable[[], Results]
Norms = tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Line:
    kernel: str
    dtype: str
    rows: int
    fused_us: float
    torch_us: float
    differ: float
    """Share of the numbers that differ from torch's."""
    units: float
    """Largest difference, in units in the last place of the number or of its row's root mean square."""
    alone: int
    """Rows with other bits alone than among the others."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=CUDA)).to(dtype)


def microseconds(call: Call) -> float:
    """Return the time of a call in a captured graph, as the median of replays."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return sorted(times)[len(times) // 2]


def difference(found: Results, wanted: Results) -> tuple[float, float]:
    differing, count, most = 0, 0, 0.0
    for mine, its in zip(found, wanted, strict=True):
        a, b = mine.double(), its.double()
        kind = mine.dtype if mine.dtype.is_floating_point else torch.float32
        size = torch.maximum(b.abs(), b.square().mean(-1, keepdim=True).sqrt()).clamp_(min=1e-30)
        differing += int((a != b).sum())
        count += a.numel()
        most = max(most, float(((a - b).abs() / size).max()) / torch.finfo(kind).eps)
    return differing / count, most


Case = tuple[str, Callable[[slice], Call], Callable[[slice], Call]]
"""A kernel's name; the fused call and torch's, of a slice of the rows."""


def sliced(function: Callable[[torch.Tensor], Results], x: torch.Tensor, part: slice) -> Call:
    return lambda: function(x[part])


def cases(dtype: torch.dtype) -> Iterator[Case]:
    most = max(ROWS)
    hidden, change = random(most, HIDDEN, dtype=dtype, scale=3), random(most, HIDDEN, dtype=dtype, seed=1)
    weight, post = 1 + random(HIDDEN, dtype=dtype, seed=2), 1 + random(HIDDEN, dtype=dtype, seed=3)
    for name, after in (("add, norm", None), ("norm, add, norm", post)):

        def add_norm(kernels: TorchKernels, after: torch.Tensor | None, part: slice) -> Call:
            return lambda: kernels.add_norm(hidden[part], change[part], after, weight, EPS)

        yield name, partial(add_norm, TRITON, after), partial(add_norm, TORCH, after)
    qkv = random(most, HEADS + 2 * KV_HEADS, DIM, dtype=dtype, seed=4)
    norms = 1 + random(DIM, dtype=dtype, seed=5), 1 + random(DIM, dtype=dtype, seed=6)
    positions = torch.arange(most, device=CUDA) * 61 % 4096
    table = random(4096, DIM, dtype=torch.float32, seed=7)
    slots = torch.randperm(4 * most, device=CUDA)[:most]
    kinds = [(dtype, "")] + [(torch.float8_e4m3fn, ", fp8 cache")] * (torch.cuda.get_device_capability() >= (8, 9))
    for stored, note in kinds:
        for normed in (None, norms):

            def rotate(kernels: TorchKernels, stored: torch.dtype, normed: Norms, part: slice) -> Call:
                cache = [torch.zeros(most // 4, 16, KV_HEADS, DIM, device=CUDA).to(stored) for _ in range(2)]
                rows = qkv[part].clone()

                def call() -> Results:
                    query = kernels.rotate_and_write(
                        rows, KV_HEADS, normed, positions[part], table, EPS, (cache[0], cache[1]), slots[part]
                    )
                    written = [each.view(torch.uint8 if each.itemsize == 1 else dtype).flatten(0, 1) for each in cache]
                    call.results = (query, *written)  # type: ignore[attr-defined]
                    return (query,)

                return call

            name = ("norm, " if normed else "") + "rotate, write" + note
            yield name, partial(rotate, TRITON, stored, normed), partial(rotate, TORCH, stored, normed)
    gate_up = random(most, 2 * INNER, dtype=dtype, seed=8, scale=3)
    yield (
        "silu",
        lambda part: lambda: (TRITON.silu_mul(gate_up[part]),),
        lambda part: lambda: (TORCH.silu_mul(gate_up[part]),),
    )
    yield (
        "gelu",
        lambda part: lambda: (TRITON.gelu_mul(gate_up[part]),),
        lambda part: lambda: (TORCH.gelu_mul(gate_up[part]),),
    )
    if len(kinds) > 1:
        for size in (HIDDEN, INNER):
            wide = random(most, size, dtype=dtype, seed=9, scale=3)
            yield f"quantize {size}", partial(sliced, fused.quantized, wide), partial(sliced, quantize, wide)
    logits = random(most, VOCAB, dtype=dtype, seed=10, scale=2)
    keys = torch.from_numpy(as_int64([row_key(5, i) for i in range(most)])).to(CUDA)
    temperatures = torch.full((most,), 0.8, device=CUDA)

    def drawn(part: slice) -> Call:
        return lambda: (draw_keyed(logits[part], keys[part], temperatures[part]),)

    yield "draw", lambda part: lambda: (fused.race(logits[part], keys[part], temperatures[part]),), drawn


def measured(case: Case, dtype: torch.dtype, rows: int) -> Line:
    name, mine, its = case
    part = slice(0, rows)
    found, wanted = results(mine(part)), results(its(part))
    share, most = difference(found, wanted)
    alone = 0
    if rows == max(ROWS):
        whole = mine(part)()
        for i in range(rows):
            one = mine(slice(i, i + 1))()
            alone += any(not torch.equal(a[0], b[i]) for a, b in zip(as_bytes(one), as_bytes(whole), strict=True))
    short = str(dtype).removeprefix("torch.")
    return Line(name, short, rows, microseconds(mine(part)), microseconds(its(part)), share, most, alone)


def results(call: Call) -> Results:
    found = call()
    everything: Results = getattr(call, "results", found)
    return everything


def as_bytes(tensors: Results) -> Results:
    return tuple(each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in tensors)


def differing_noise() -> int:
    """Return how many of the vocabulary's noises are others than torch's: a race over equal logits shows one winner,
    so each column is raced alone, against one that cannot win."""
    logits = torch.full((64, VOCAB), -torch.inf, device=CUDA)
    columns = torch.arange(64, device=CUDA) * 2003
    logits.scatter_(1, columns.unsqueeze(1), 0.0)
    row_keys = [row_key(9, i) for i in range(64)]
    halves, keys = (torch.from_numpy(made(row_keys)).to(CUDA) for made in (key_halves, as_int64))
    won = fused.race(logits, keys)
    noise = log_exponential(halves, torch.arange(VOCAB, device=CUDA, dtype=torch.int32).unsqueeze(0))
    flat = torch.zeros(64, VOCAB, device=CUDA)
    return int((won != columns).sum()) + int((fused.race(flat, keys) != (-noise).argmax(1)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    began = time.perf_counter()
    lines: list[Line] = []
    print(f"{'kernel':34} {'dtype':9} rows   fused   torch  times  differ   units  alone")
    for dtype in (torch.bfloat16, torch.float16):
        for case in cases(dtype):
            if dtype == torch.float16 and case[0] in ("draw", "gelu"):
                continue
            for rows in ROWS if dtype == torch.bfloat16 else ROWS[-1:]:
                try:
                    line = measured(case, dtype, rows)
                except Exception as error:
                    print(f"{case[0]:34} {dtype}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    break
                lines.append(line)
                print(
                    f"{line.kernel:34} {line.dtype:9} {line.rows:4} {line.fused_us:7.2f} {line.torch_us:7.2f}"
                    f" {line.torch_us / line.fused_us:6.1f} {line.differ:7.1e} {line.units:7.2f} {line.alone:6}",
                    flush=True,
                )
    seconds = time.perf_counter() - began
    noise = differing_noise()
    print(f"draws that the noise decides otherwise: {noise} of 128; {seconds:.0f} s")
    if options.json:
        whole = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "seconds": seconds,
            "noise": noise,
            "results": [asdict(line) for line in lines],
        }
        with open(options.json, "w") as file:
            json.dump(whole, file, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
