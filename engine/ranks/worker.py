"""The process of a rank above 0: `python -m pilotfish.engine.ranks.worker`, started by `launch.start_worker`. It ends
with its parent, when the leader says so, or when the leader falls silent. `follower` does the work. No torch."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable

import msgspec

from pilotfish import logs
from pilotfish.engine import child_process
from pilotfish.engine.ranks.launch import WorkerTask
from pilotfish.engine.ranks.link import Link
from pilotfish.engine.ranks.wire import Welcome
from pilotfish.errors import CollectiveError, PilotfishError, one_line

logger = logging.getLogger(__name__)

Follow = Callable[[WorkerTask, Welcome, Link], None]


def run(import_follow: Callable[[], Follow]) -> int:
    """Run until the leader ends this process. Reports a failure to the leader and returns the exit status.

    `import_follow` is called once, after the watch on the parent has begun and before the rank joins: imports block the
    interpreter for seconds on a busy machine, and a rank that has joined may not fall silent.
    """
    child_process.ignore_signals()
    task = child_process.read_task(WorkerTask)
    # At level info every rank would log the same lines as the leader.
    logs.configure(msgspec.structs.replace(task.logs, level="warning") if task.logs.level == "info" else task.logs)
    child_process.end_with_parent(lambda: _remove(task.directory))

    def end(reason: str) -> None:
        if reason:
            logger.info("rank %d ends: %s", task.rank, reason)
        _remove(task.directory)
        _exit(1 if reason else 0)

    link: Link | None = None
    try:
        follow = import_follow()
        link = Link(task.config, task.rank, task.endpoint, end)
        follow(task, link.wait_welcome(), link)
    except Exception as error:
        consequence = isinstance(error, CollectiveError)  # another rank is the cause, and the leader will say which
        if isinstance(error, PilotfishError):
            logger.log(logging.INFO if consequence else logging.ERROR, "rank %d failed: %s", task.rank, error)
        else:
            logger.exception("rank %d failed", task.rank)
        link = link or Link(task.config, task.rank, task.endpoint, end)
        link.fail(one_line(error), consequence)
    return 1


def main(import_follow: Callable[[], Follow]) -> None:
    """Run, and end this process at once: threads of gloo, NCCL and the kernels may wait for ranks that have ended."""
    _exit(run(import_follow))


def _remove(directory: str | None) -> None:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def _exit(status: int) -> None:
    logging.shutdown()
    os._exit(status)


def _import_follow() -> Follow:
    from pilotfish.engine.ranks.follower import follow

    return follow


if __name__ == "__main__":
    main(_import_follow)
