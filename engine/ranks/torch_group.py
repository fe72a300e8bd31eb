"""A Communicator over torch.distributed: gloo on the CPU, NCCL on CUDA. The leader serves the store for meeting.

The process groups are made by hand, not through `torch.distributed.init_process_group`, whose group is global: a
process may have several engines, one after the other or side by side.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, GatherOptions

from pilotfish.errors import CollectiveError, ConfigError

NCCL_TIMEOUT = timedelta(hours=1)
"""A collective may wait for as long as a rank computes; the watch, which knows more, finds the rank that hangs."""


def collective_seconds(rank_timeout: float) -> float:
    """How long a collective on the CPU may wait for the others: longer than the watch, which knows more, takes."""
    return max(30.0, 2 * rank_timeout)


class TorchGroup:
    """The ranks of one model; a `Communicator`. One thread at a time may use it.

    `entered` counts the collectives that this rank has entered: of two ranks that wait for each other, the one with
    fewer is the one that hangs. On CUDA they count when they are queued, and not when a CUDA graph replays them.
    """

    def __init__(self, rank: int, size: int, device: torch.device, backend: Any) -> None:
        self.rank = rank
        self.size = size
        self.entered = 0
        self._device = device
        self._backend = backend

    @property
    def name(self) -> str:
        """The backend's name."""
        return str(self._backend.name())

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator`. x: any shape, contiguous or not; the result has its shape and dtype."""
        self.entered += 1
        if self._device.type == "cuda":
            x = x.contiguous()
            options = AllreduceOptions()
            options.asyncOp = False  # on the current stream, as all that comes before and after it
            self._wait(lambda: self._backend.allreduce([x], options))
            return x
        # Not gloo's own sum: it cuts the tensor into pieces, each summed in another order of ranks, so that a row's
        # last bits would depend on the rows beside it.
        flat = x.reshape(1, -1)
        parts = flat.new_empty(self.size, flat.shape[1])
        self._wait(lambda: self._backend._allgather_base(parts, flat.contiguous(), AllgatherOptions()))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.view(x.shape)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator`. x: (rows, part)."""
        self.entered += 1
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = GatherOptions()
        options.rootRank = 0
        options.asyncOp = False
        self._wait(lambda: self._backend.gather([parts] if parts else [], [x], options))
        return torch.cat(parts, dim=1) if parts else x

    def abort(self) -> None:
        """Make a waiting collective fail, from another thread. On CUDA nothing else ends one whose peer has ended."""
        with suppress(RuntimeError):
            self._backend.abort()

    def close(self) -> None:
        """Close the connections."""
        with suppress(RuntimeError):
            self._backend.shutdown()

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            work = start()
            if work is not None:  # else it is queued on the current stream
                work.wait()
        except RuntimeError as error:
            raise CollectiveError(f"rank {self.rank} could not complete a collective: {error}") from error


def serve_store(host: str, size: int) -> dist.TCPStore:
    """Serve the store in which the ranks meet, on any free port: of `host` alone if that is an address of this
    machine's, of all its addresses otherwise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        listener = socket.create_server(("", 0))
    # The store takes the socket over.
    return dist.TCPStore(
        "localhost",
        listener.getsockname()[1],
        size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, size: int, timeout: float) -> dist.TCPStore:
    """Connect to the store that rank 0 serves."""
    return dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def connect(store: dist.Store, rank: int, size: int, device: torch.device, master: str, timeout: float) -> TorchGroup:
    """Connect to the other ranks through `store`: all of them call this, and none returns before all have.

    `master`: address of rank 0, which determines this host's own address; `timeout`: seconds that a collective on the
    CPU may wait for the others. Raises CollectiveError if they do not join, ConfigError if torch lacks the backend.
    """
    store.set_timeout(timedelta(seconds=timeout))
    options: Any
    backend: Any
    try:
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise ConfigError("tensor_parallel_size needs NCCL on CUDA, which this torch was built without")
            # By default torch ends a process whose collective has failed; here the watch does, and says why.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = NCCL_TIMEOUT
            backend = dist.ProcessGroupNCCL(store, rank, size, options)
            backend.eager_connect_single_device(device)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timedelta(seconds=timeout)
            options._devices = [gloo.create_device(hostname=_own_address(master))]
            backend = gloo(store, rank, size, options)
    except RuntimeError as error:
        raise CollectiveError(f"rank {rank} could not meet the others: {error}") from error
    return TorchGroup(rank, size, device, backend)


def _own_address(master: str) -> str:
    """This host's address on the route to rank 0."""
    family, kind, protocol, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
