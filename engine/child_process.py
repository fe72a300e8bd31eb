"""Child processes of an engine: how they are started, given a task, watched, and ended with their parent.

A child reads one line of JSON from its standard input, which its parent then holds open: end of file there means that
the parent has ended, for whatever reason.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

T = TypeVar("T")

LastWords = Callable[[str], None]
"""Tells the client why the engine ends, and ends the process at once: for a thread that finds the main one stuck."""

HEARTBEAT_SECONDS = 1.0
"""Longest time between two signs of life of a process that is watched."""


def command_of(module: str) -> tuple[str, ...]:
    """The command that runs a module of this package as a process."""
    # -P: never import `pilotfish`, or anything that it imports, from the current folder.
    return (sys.executable, "-P", "-m", module)


def environment() -> dict[str, str]:
    """The environment of a child: it imports from where this process does, even if the package is not installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def ignore_signals() -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP. Ctrl-C and the end of a terminal reach every process of it, and a service
    manager's SIGTERM every process of the service; all are the server's to act on: it drains, and then stops its
    engine."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def read_task(kind: type[T]) -> T:
    """Read the task that this process was started with."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        return msgspec.json.decode(stdin.readline(), type=kind)


def encode_task(task: msgspec.Struct) -> bytes:
    """The bytes that a parent writes for `read_task`."""
    return msgspec.json.encode(task) + b"\n"


def end_with_parent(clean: Callable[[], object] = lambda: None) -> None:
    """End this process, wherever it is, once the parent's end of standard input is closed; `clean` is called first."""

    def watch() -> None:
        # Not through sys.stdin: a daemon thread that holds its lock would crash the interpreter's own shutdown.
        while os.read(0, 4096):
            pass
        clean()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def how_it_ended(code: int) -> str:
    """Describe the end of a process, to follow its name. `code`: exit status, or the negative number of a signal."""
    if code >= 0:
        return f"ended by itself with exit code {code}; its log says why"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (if nobody killed it, the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def heartbeat_seconds(timeout: float) -> float:
    """Seconds between two heartbeats of a process that may be silent for `timeout` seconds."""
    return min(HEARTBEAT_SECONDS, timeout / 5)


class PatientClock:
    """A clock that stands still while its process does: when it is stopped, or its machine is paused or overloaded, so
    that the processes that it watches may have been unable to report, too.

    `most`: the most seconds that are counted between two readings.
    """

    def __init__(self, most: float = 2 * HEARTBEAT_SECONDS) -> None:
        self._most = most
        self._last = time.monotonic()
        self._time = 0.0

    def now(self) -> float:
        """Seconds since it was made."""
        moment = time.monotonic()
        self._time += min(moment - self._last, self._most)
        self._last = moment
        return self._time
