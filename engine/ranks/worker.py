"""The process of a rank above 0: `python -m pilotfish.engine.ranks.worker`, started with a `WorkerLaunch` (see
`engine.process.child`). It ends with its parent, when rank 0 says so, and when rank 0 falls silent. What it computes is
`follower`'s, which needs torch; here is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

import msgspec

from pilotfish import logs
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process import child as processes
from pilotfish.engine.ranks.control_messages import Beat, Welcome
from pilotfish.engine.ranks.link import Link
from pilotfish.errors import CollectiveError, PilotfishError
from pilotfish.logs import Logs

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long a rank may take to end once it is told to."""
WORKER_COMMAND = processes.command_of("pilotfish.engine.ranks.worker")


class WorkerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is started with. `endpoint`: rank 0's end of the control channel; `directory`: of the sockets, if
    they are files, to be removed if rank 0 has gone without doing so."""

    config: EngineConfig
    rank: int
    endpoint: str
    directory: str | None = None
    logs: Logs = Logs()


def start_worker(
    config: EngineConfig,
    rank: int,
    endpoint: str,
    directory: str | None = None,
    command: Sequence[str] = WORKER_COMMAND,
) -> subprocess.Popen[bytes]:
    """Start a rank of this host. It ends when the standard input of what is returned is closed."""
    # In a process group of its own: a terminal's Ctrl-C does not reach it, and if its parent dies while it is stopped,
    # its group is orphaned, for which the kernel ends it (POSIX: SIGHUP and SIGCONT).
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=processes.environment(), process_group=0)
    assert process.stdin is not None
    launch = WorkerLaunch(config=config, rank=rank, endpoint=endpoint, directory=directory, logs=logs.current())
    process.stdin.write(msgspec.json.encode(launch) + b"\n")
    process.stdin.flush()
    return process


def end_workers(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End ranks of this host, and wait until they are gone."""
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


class State:
    """What the beats of a rank tell; its main thread writes it, its link's thread reads it."""

    def __init__(self) -> None:
        self.beat: Callable[[], Beat] = Beat


Serve = Callable[[WorkerLaunch, Welcome, Link, State], None]


def run(serve: Serve) -> int:
    """Take part until rank 0 ends this process. Returns the exit status after a failure, which rank 0 has been told.

    `serve` is called once, after the watch on the parent has begun: imports that take their time belong into it.
    """
    processes.ignore_signals()
    launch = processes.read_launch(WorkerLaunch)
    # What all ranks find worth a line, rank 0 has said.
    logs.configure(
        msgspec.structs.replace(launch.logs, level="warning") if launch.logs.level == "info" else launch.logs
    )
    processes.end_with_parent(lambda: _remove(launch.directory))
    state = State()

    def end(reason: str) -> None:
        if reason:
            logger.info("rank %d ends: %s", launch.rank, reason)
        _remove(launch.directory)
        _exit(1 if reason else 0)

    link = Link(launch.config, launch.rank, launch.endpoint, lambda: state.beat(), end)
    try:
        serve(launch, link.wait_welcome(), link, state)
    except CollectiveError as error:  # another rank is the cause, and rank 0 will say which
        logger.info("rank %d failed: %s", launch.rank, error)
        link.fail(one_line(error), consequence=True)
    except PilotfishError as error:
        logger.error("rank %d failed: %s", launch.rank, error)
        link.fail(one_line(error))
    except Exception as error:
        logger.exception("rank %d failed", launch.rank)
        link.fail(one_line(error))
    return 1


def one_line(error: Exception) -> str:
    """An error as the end of a sentence."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, PilotfishError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _remove(directory: str | None) -> None:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def _exit(status: int) -> None:
    """End at once: threads of gloo, NCCL and the kernels may be waiting for ranks that have gone."""
    logging.shutdown()
    os._exit(status)


def _serve(launch: WorkerLaunch, welcome: Welcome, link: Link, state: State) -> None:
    from pilotfish.engine.ranks.follower import serve

    serve(launch, welcome, link, state)


if __name__ == "__main__":
    _exit(run(_serve))
