"""Measuring the ranks' all-reduce, in one process per rank, each with its own device and group."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from pilotfish.engine.ranks.torch_group import connect, join_store, serve_store
from pilotfish.tools.selftest.timing import median_seconds

HOST = "127.0.0.1"
TIMEOUT = 60.0
"""Seconds that the ranks wait for each other."""
LIMIT = 120.0
"""Seconds that all of it may take."""
LARGE = 64 << 20
"""Bytes of the sum whose bandwidth is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceTest:
    ranks: int
    device: str
    """cpu or cuda; rank r has GPU r."""
    dtype: torch.dtype
    hidden_size: int
    quick: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    backend: str
    wrong: int
    """Numbers that are not the sum, counted over all ranks."""
    small: int
    """Bytes of the sum whose latency is measured: a row of hidden states."""
    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes per second that cross a rank's link in one direction, as NCCL's tests count them."""


def measure_all_reduce(settings: AllReduceTest) -> Figures:
    """Run the ranks' processes and return rank 0's figures. Raises RuntimeError if a rank fails, and TimeoutError."""
    store = serve_store(HOST, settings.ranks)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=_run_rank, args=(sender, settings, rank, store.port)) for rank in range(settings.ranks)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        if not receiver.poll(LIMIT):
            raise TimeoutError(f"the ranks took longer than {LIMIT:.0f} s")
        found = receiver.recv()
    except EOFError:
        raise RuntimeError("the ranks ended without a reason") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    figures: Figures = found
    return figures


def _run_rank(parent: Connection, settings: AllReduceTest, rank: int, port: int) -> None:
    """Send rank 0's figures, or any rank's error as text."""
    try:
        figures = measure_rank(settings, rank, port)
    except Exception as error:
        parent.send(f"{type(error).__name__}: {error}")
    else:
        if rank == 0:
            parent.send(figures)


def measure_rank(settings: AllReduceTest, rank: int, port: int) -> Figures:
    """Measure as one rank; rank 0's figures count."""
    device = torch.device(settings.device, rank) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dtype = settings.dtype
    store = join_store(HOST, port, settings.ranks, TIMEOUT)
    group = connect(store, rank, settings.ranks, device, HOST, TIMEOUT)

    with torch.inference_mode():
        wrong = 0
        for rows in (1, 5, 64):
            # Small whole numbers, so that sums are exact in every dtype.
            numbers = (torch.arange(rows * settings.hidden_size) % 7).view(rows, -1)
            total = sum(numbers * (1 + each % 3) for each in range(settings.ranks))
            summed = group.all_reduce((numbers * (1 + rank % 3)).to(device, dtype))
            own = (summed.cpu() != torch.as_tensor(total).to(dtype)).sum()
            wrong += int(group.all_reduce(own.view(1, 1).float().to(device)))
        row = torch.ones(1, settings.hidden_size, device=device, dtype=dtype)
        latency = median_seconds(device, lambda: group.all_reduce(row.clone()), 20 if settings.quick else 200)
        size = LARGE // 8 if settings.quick or device.type == "cpu" else LARGE
        large = torch.ones(size // dtype.itemsize, device=device, dtype=dtype)
        crossed = 2 * (settings.ranks - 1) / settings.ranks * size
        bandwidth = crossed / median_seconds(device, lambda: group.all_reduce(large), 5)
    backend = group.name
    group.close()
    return Figures(backend=backend, wrong=wrong, small=row.nbytes, latency=latency, bandwidth=bandwidth)
