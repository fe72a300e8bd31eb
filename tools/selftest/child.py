"""The process of one group of checks, started by `tools.selftest.run`. It imports torch once it runs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from pilotfish.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pilotfish.tools.selftest.settings import SelfTest

ENVIRONMENT = "environment"
"""The group that has no checks, but describes the machine."""
RESTART = 75
"""Exit status of a process whose device has become unusable, after its last result."""


def main(parent: Connection, errors: str, test: SelfTest, group: str, done: tuple[str, ...]) -> None:
    """Run a group's checks but those `done`, sending the name of each before it starts and its Result afterwards.

    For the group ENVIRONMENT, the Environment is sent instead. The last message is None, or the ConfigError or
    ModelError for which nothing can be checked. All that is printed goes to the file `errors`.
    """
    file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    # Imported here, so that a crash on import (of a CUDA library) is reported like any other.
    from pilotfish.tools.selftest.groups import describe_here, device_is_lost, run_group

    try:
        if group == ENVIRONMENT:
            parent.send(describe_here(test))
        else:
            for result in run_group(test, group, done, parent.send):
                parent.send(result)
                if result.verdict == "failed" and device_is_lost():
                    sys.exit(RESTART)
    except (ConfigError, ModelError) as error:
        parent.send(error)
    else:
        parent.send(None)


def _end_with_parent(parent: Connection) -> None:
    """End this process when the pipe closes; nothing is sent in this direction."""
    try:
        parent.recv()
    except EOFError:
        os._exit(1)
