"""The faults that `benchmarks/soak.py` injects into a running server, by name."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Awaitable, Callable

import psutil

from tests.support.running_server import RunningServer

STOP_SECONDS = 10.0
SHORTAGE_SECONDS = 5.0


async def kill_engine(server: RunningServer) -> None:
    """SIGKILL to the engine process."""
    server.engine.kill()


async def kill_rank(server: RunningServer) -> None:
    """SIGKILL to a process of a sharded model other than rank 0."""
    server.engine.children()[-1].kill()


async def stop_engine(server: RunningServer) -> None:
    """SIGSTOP to the engine process, and SIGCONT after 10 seconds."""
    engine = server.engine
    engine.send_signal(signal.SIGSTOP)
    await asyncio.sleep(STOP_SECONDS)
    engine.send_signal(signal.SIGCONT)


async def stop_server(server: RunningServer) -> None:
    """SIGSTOP to the server process, and SIGCONT after 10 seconds."""
    server.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(STOP_SECONDS)
    server.process.send_signal(signal.SIGCONT)


async def fill_disk(server: RunningServer) -> None:
    """For 5 seconds no file of the server can grow: neither its log nor its store of responses."""
    await _limit(server, resource.RLIMIT_FSIZE, 1)


async def descriptors(server: RunningServer) -> None:
    """For 5 seconds the server can open no more files and connections."""
    await _limit(server, resource.RLIMIT_NOFILE, psutil.Process(server.process.pid).num_fds())


async def drop_connections(server: RunningServer) -> None:
    """All clients' connections are cut at once. `soak.py` does it, on its side of them."""


async def _limit(server: RunningServer, what: int, value: int) -> None:
    process = psutil.Process(server.process.pid)
    soft, hard = process.rlimit(what)
    process.rlimit(what, (value, hard))
    await asyncio.sleep(SHORTAGE_SECONDS)
    process.rlimit(what, (soft, hard))


FAULTS: dict[str, Callable[[RunningServer], Awaitable[None]]] = {
    "kill-engine": kill_engine,
    "kill-rank": kill_rank,
    "stop-engine": stop_engine,
    "stop-server": stop_server,
    "fill-disk": fill_disk,
    "descriptors": descriptors,
    "drop-connections": drop_connections,
}
