"""A rank's process that fails as it is told, for test_ranks.py: `python fake_worker.py BEHAVIOUR`.

cannot import: its first import fails. cannot load: reports an error while it loads. exit: vanishes with exit code 7.
hang: rank 2 never enters a collective. capture: does nothing wrong, but captures passes on the CPU, as its rank 0 must,
too.
"""

from __future__ import annotations

import os
import sys
import time

from pilotfish.engine.execution.batch import HostBatch
from pilotfish.engine.ranks import worker
from pilotfish.engine.ranks.launch import WorkerTask
from pilotfish.engine.ranks.link import Link
from pilotfish.engine.ranks.wire import Welcome
from pilotfish.engine.ranks.worker import Follow
from pilotfish.errors import ModelError


def import_follow() -> Follow:
    from pilotfish.engine import assembly
    from pilotfish.engine.execution.graphs import EagerGraphs
    from pilotfish.engine.ranks import follower

    if sys.argv[1] == "cannot import":
        raise ImportError("no such library")
    if sys.argv[1] == "capture":
        assembly.graph_backend = lambda *_: EagerGraphs

    def follow(task: WorkerTask, welcome: Welcome, link: Link) -> None:
        class Failing(assembly.Assembly):
            def __init__(self, *arguments: object) -> None:
                if sys.argv[1] == "cannot load":
                    raise ModelError("no memory is left for its part")
                super().__init__(*arguments)  # type: ignore[arg-type]

            def allocate(self, *arguments: object) -> None:
                super().allocate(*arguments)  # type: ignore[arg-type]
                if sys.argv[1] == "hang" and task.rank == 2:
                    self.sharded = [Stuck()]  # type: ignore[list-item]

        if sys.argv[1] == "exit":
            os._exit(7)
        follower.follow(task, welcome, link, Failing)

    return follow


class Stuck:
    def run_batch(self, host: HostBatch) -> None:
        time.sleep(600)


if __name__ == "__main__":
    worker.main(import_follow)
