"""What the ranks' sums cost: `python -m pilotfish.tools.selftest.all_reduce` reads a line of JSON, a `Launch`, starts a
process for each rank, and prints rank 0's `Figures`. Processes of their own, because a rank has a device, and a group,
to itself."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

HOST = "127.0.0.1"
TIMEOUT = 60.0
LARGE = 64 << 20
"""Bytes of the sum whose bandwidth is measured."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    ranks: int
    device: str
    """cpu or cuda; rank r has GPU r."""
    dtype: str
    hidden_size: int
    quick: bool
    rank: int | None = None
    """None: start them all."""
    port: int = 0
    """Of the store that they meet in."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    backend: str
    wrong: int
    """Numbers that are not the sum, on any rank."""
    small: int
    """Bytes of the sum whose latency is measured: a row of hidden states."""
    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes per second that cross a rank's link in one direction, as NCCL's tests count them."""


def main() -> int:
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    if launch.rank is not None:
        figures = measure(launch)
        if launch.rank == 0:
            print(msgspec.json.encode(figures).decode(), flush=True)
        return 0
    from pilotfish.engine.ranks.torch_group import serve_store

    store = serve_store(HOST, launch.ranks)
    processes = []
    for rank in range(launch.ranks):
        process = subprocess.Popen([sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE)
        processes.append(process)
        assert process.stdin is not None
        own = msgspec.structs.replace(launch, rank=rank, port=store.port)
        process.stdin.write(msgspec.json.encode(own) + b"\n")
        process.stdin.close()
    try:
        return max(abs(process.wait(TIMEOUT)) for process in processes)
    finally:
        for process in processes:
            process.kill()


def measure(launch: Launch) -> Figures:
    """This rank's part. Rank 0's figures count."""
    import torch

    from pilotfish.engine.device import synchronize
    from pilotfish.engine.ranks.torch_group import connect, join_store

    assert launch.rank is not None
    device = torch.device(launch.device, launch.rank) if launch.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dtype = getattr(torch, launch.dtype)
    store = join_store(HOST, launch.port, launch.ranks, TIMEOUT)
    group = connect(store, launch.rank, launch.ranks, device, HOST, TIMEOUT)

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
            numbers = (torch.arange(rows * launch.hidden_size) % 7).view(rows, -1)
            total = sum(numbers * (1 + rank % 3) for rank in range(launch.ranks))
            summed = group.all_reduce((numbers * (1 + launch.rank % 3)).to(device, dtype))
            own = (summed.cpu() != torch.as_tensor(total).to(dtype)).sum()
            wrong += int(group.all_reduce(own.view(1, 1).float().to(device)))
        row = torch.ones(1, launch.hidden_size, device=device, dtype=dtype)
        latency = seconds(lambda: group.all_reduce(row.clone()), 20 if launch.quick else 200)
        size = LARGE // 8 if launch.quick or device.type == "cpu" else LARGE
        large = torch.ones(size // dtype.itemsize, device=device, dtype=dtype)
        crossed = 2 * (launch.ranks - 1) / launch.ranks * size
        bandwidth = crossed / seconds(lambda: group.all_reduce(large), 5)
    backend = group.name
    group.close()
    return Figures(backend=backend, wrong=wrong, small=row.nbytes, latency=latency, bandwidth=bandwidth)


if __name__ == "__main__":
    sys.exit(main())
