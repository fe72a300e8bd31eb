"""What the processes of an engine have in common: how they are started, told their task, and end with their parent.

A child reads one line of JSON from its standard input, which its parent then holds open for as long as it lives: end of
file there means that the parent has gone, however it went.
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

Launch = TypeVar("Launch")

BEAT_SECONDS = 1.0
"""At least so often does a process that is watched say that it lives."""


def command_of(module: str) -> tuple[str, ...]:
    """How a module of this package is run as a process."""
    # -P: the folder that a user happens to stand in is not where `engine`, or anything that it imports, comes from.
    return (sys.executable, "-P", "-m", module)


def environment() -> dict[str, str]:
    """Of a child: it imports from where this process does, whether or not the package is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def ignore_signals() -> None:
    """Ctrl-C reaches every process of the terminal, and a service manager's SIGTERM every process of the service. Both
    are the server's to hear, to drain, and then to stop its engine."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_launch(kind: type[Launch]) -> Launch:
    """What this process was started with."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        return msgspec.json.decode(stdin.readline(), type=kind)


def end_with_parent(clean: Callable[[], object] = lambda: None) -> None:
    """End this process, wherever it is, once the parent's end of standard input is closed; `clean` comes first."""

    def watch() -> None:
        # Not through sys.stdin: a daemon thread that holds its lock would crash the interpreter's own shutdown.
        while os.read(0, 4096):
            pass
        clean()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def how_it_ended(code: int) -> str:
    """What became of a process, after its name. `code`: its exit status, or the negative number of a signal."""
    if code >= 0:
        return f"ended by itself with exit code {code}; its log says why"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (if nobody killed it, the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def beat_seconds(timeout: float) -> float:
    """How often it says so, if it may be silent for `timeout` seconds."""
    return min(BEAT_SECONDS, timeout / 5)


class PatientClock:
    """A clock that stands still while its process does: stopped, or on a machine that is paused or overloaded, where
    those that it watches may have had no chance to speak either.

    `most`: seconds between two readings that count in full; of a longer time so much is counted.
    """

    def __init__(self, most: float = 2 * BEAT_SECONDS) -> None:
        self._most = most
        self._last = time.monotonic()
        self._time = 0.0

    def now(self) -> float:
        """Seconds since it was made."""
        moment = time.monotonic()
        self._time += min(moment - self._last, self._most)
        self._last = moment
        return self._time
