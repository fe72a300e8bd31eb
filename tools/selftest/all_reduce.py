"""The cost of the ranks' sums. `measure_all_reduce` starts a process for each rank, which reads an `AllReduceTest` from
its standard input; rank 0 prints its `Figures`. Each rank needs a process because it has a device, and a group, to
itself."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import msgspec
import torch

from pilotfish.engine.device import synchronize
from pilotfish.engine.ranks.torch_group import connect, join_store, serve_store

HOST = "127.0.0.1"
TIMEOUT = 60.0
"""Seconds that the ranks wait for each other."""
LIMIT = 120.0
"""Seconds that all of it may take."""
LARGE = 64 << 20
"""Bytes of the sum whose bandwidth is measured."""


class AllReduceTest(msgspec.Struct, frozen=True, kw_only=True):
    ranks: int
    device: str
    """cpu or cuda; rank r has GPU r."""
    dtype: str
    hidden_size: int
    quick: bool
    rank: int = 0
    port: int = 0
    """Port of the store that the ranks meet in."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    backend: str
    wrong: int
    """Numbers that are not the sum, over all ranks."""
    small: int
    """Bytes of the sum whose latency is measured: a row of hidden states."""
    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes per second that cross a rank's link in one direction, as NCCL's tests count them."""


def measure_all_reduce(settings: AllReduceTest) -> Figures:
    """Run the ranks' processes and return rank 0's figures. Raises RuntimeError where a rank fails, TimeoutError."""
    store = serve_store(HOST, settings.ranks)
    processes = []
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        try:
            for rank in range(settings.ranks):
                command = [sys.executable, "-m", __name__]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=printed, stderr=errors)
                processes.append(process)
                assert process.stdin is not None
                own = msgspec.structs.replace(settings, rank=rank, port=store.port)
                process.stdin.write(msgspec.json.encode(own))
                process.stdin.close()
            deadline = time.monotonic() + LIMIT
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the ranks took longer than {LIMIT:.0f} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError((lines or ["no reason given"])[-1])
        printed.seek(0)
        return msgspec.json.decode(printed.read().splitlines()[-1], type=Figures)


def measure_rank(settings: AllReduceTest) -> Figures:
    """Take part as one rank. Rank 0's figures count."""
    device = torch.device(settings.device, settings.rank) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dtype = getattr(torch, settings.dtype)
    store = join_store(HOST, settings.port, settings.ranks, TIMEOUT)
    group = connect(store, settings.rank, settings.ranks, device, HOST, TIMEOUT)

    def seconds(action: Callable[[], object], times: int) -> float:
        found = []
        for _ in range(times + 3):
            synchronize(device)
            begin = time.perf_counter()
            action()
            synchronize(device)
            found.append(time.perf_counter() - begin)
        return statistics.median(found[3:])

    with torch.inference_mode():
        wrong = 0
        for rows in (1, 5, 64):
            # Small whole numbers, so that sums are exact in every dtype.
            numbers = (torch.arange(rows * settings.hidden_size) % 7).view(rows, -1)
            total = sum(numbers * (1 + rank % 3) for rank in range(settings.ranks))
            summed = group.all_reduce((numbers * (1 + settings.rank % 3)).to(device, dtype))
            own = (summed.cpu() != torch.as_tensor(total).to(dtype)).sum()
            wrong += int(group.all_reduce(own.view(1, 1).float().to(device)))
        row = torch.ones(1, settings.hidden_size, device=device, dtype=dtype)
        latency = seconds(lambda: group.all_reduce(row.clone()), 20 if settings.quick else 200)
        size = LARGE // 8 if settings.quick or device.type == "cpu" else LARGE
        large = torch.ones(size // dtype.itemsize, device=device, dtype=dtype)
        crossed = 2 * (settings.ranks - 1) / settings.ranks * size
        bandwidth = crossed / seconds(lambda: group.all_reduce(large), 5)
    backend = group.name
    group.close()
    return Figures(backend=backend, wrong=wrong, small=row.nbytes, latency=latency, bandwidth=bandwidth)


if __name__ == "__main__":
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=AllReduceTest)
    figures = measure_rank(settings)
    if settings.rank == 0:
        print(msgspec.json.encode(figures).decode(), flush=True)
