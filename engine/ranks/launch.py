"""Starting and ending the worker processes of a host: the parent's side of `worker`. No torch."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

import msgspec

from pilotfish import logs
from pilotfish.engine import child_process
from pilotfish.engine.config import EngineConfig
from pilotfish.logs import Logs

STOP_SECONDS = 5.0
"""Time that a worker has to end before it is killed."""
WORKER_COMMAND = child_process.command_of("pilotfish.engine.ranks.worker")


class WorkerTask(msgspec.Struct, frozen=True, kw_only=True):
    """The task that a worker is started with."""

    config: EngineConfig
    rank: int
    endpoint: str
    """Address of the control channel."""
    directory: str | None = None
    """Folder of the sockets, if they are files; the worker removes it if the leader has ended without doing so."""
    logs: Logs = Logs()


def start_worker(
    config: EngineConfig,
    rank: int,
    endpoint: str,
    directory: str | None = None,
    command: Sequence[str] = WORKER_COMMAND,
) -> subprocess.Popen[bytes]:
    """Start a rank of this host. It ends when its standard input is closed."""
    # In a process group of its own: a terminal's Ctrl-C does not reach it, and if its parent dies while it is stopped,
    # its group is orphaned, for which the kernel ends it (POSIX: SIGHUP and SIGCONT).
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=child_process.environment(), process_group=0)
    assert process.stdin is not None
    task = WorkerTask(config=config, rank=rank, endpoint=endpoint, directory=directory, logs=logs.current())
    process.stdin.write(child_process.encode_task(task))
    process.stdin.flush()
    return process


def end_workers(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End ranks of this host, and wait until they have ended."""
    for worker in workers:
        if worker.stdin is not None:
            with contextlib.suppress(OSError):
                worker.stdin.close()
    for worker in workers:
        try:
            worker.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
