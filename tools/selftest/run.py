"""Running the groups of checks, each in its own process, so that a kernel that crashes, hangs or breaks its GPU's
context fails one check only. This side imports no torch; the other is `tools.selftest.child`.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from math import inf

from pilotfish.errors import PilotfishError
from pilotfish.tools.selftest import child
from pilotfish.tools.selftest.check import Result
from pilotfish.tools.selftest.environment import Environment
from pilotfish.tools.selftest.settings import SelfTest

GROUPS = ("kernels", "attention", "sampling", "logits", "text", "graphs", "parallel", "speed")
"""The modules of `tools.selftest` that have checks, in the order in which they run."""
LIMIT = 600.0
"""Seconds that one check may take."""
EXIT_SECONDS = 10.0
"""Time for a process to release what it holds after its last message, before it is killed."""

OnStart = Callable[[str, str], object]
"""Called with a check's group and name."""


def describe(test: SelfTest) -> Environment:
    """Describe this machine. Raises ConfigError or ModelError where nothing can be checked with the test's settings."""
    for item in _in_process(test, child.ENVIRONMENT, (), lambda group, name: None, LIMIT):
        if isinstance(item, Environment):
            return item
        if item is not None:
            raise PilotfishError(f"the self-test cannot start: {item.detail}")
    raise AssertionError


def run_groups(test: SelfTest, on_start: OnStart, limit: float = LIMIT) -> Iterator[Result]:
    """Yield the results of all checks. Raises ConfigError or ModelError for settings that cannot work."""
    for group in GROUPS:
        yield from run_group(test, group, on_start, limit)


def run_group(
    test: SelfTest, group: str, on_start: OnStart, limit: float = LIMIT, group_limit: float = inf
) -> Iterator[Result]:
    """Yield the results of a group's checks, each of which may take `limit` seconds, and all of them `group_limit`: the
    check that is running then fails, and the others are left out. Raises as `run_groups`."""
    done: tuple[str, ...] = ()
    end = time.monotonic() + group_limit
    again = True
    while again:
        again = False
        for item in _in_process(test, group, done, on_start, limit, end):
            # The rest of the group gets another process if this one ends early, unless no check was started.
            again = isinstance(item, Result) and item.name != group and time.monotonic() < end
            if isinstance(item, Result):
                yield item
                done = (*done, item.name)


def _in_process(
    test: SelfTest, group: str, done: tuple[str, ...], on_start: OnStart, limit: float, end: float = inf
) -> Iterator[Result | Environment | None]:
    """Yield what a group's process reports, and None at its regular end.

    A check fails if the process ends or takes too long during it; a failure before the first check is a result with the
    group's name.
    """
    spawn = multiprocessing.get_context("spawn")
    current = group

    def failed(reason: str) -> Result:
        return Result(group=group, name=current, verdict="failed", detail=reason)

    with tempfile.NamedTemporaryFile() as errors:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=child.main, args=(theirs, errors.name, test, group, done))
        process.start()
        theirs.close()
        try:
            while ours.poll(allowed := max(0.0, min(limit, end - time.monotonic()))):
                match ours.recv():
                    case str(name):
                        current = name
                        on_start(group, name)
                    case PilotfishError() as error:
                        raise error
                    case None:
                        process.join(EXIT_SECONDS)
                        yield None
                        return
                    case item:
                        yield item
            over = "its step took too long" if allowed < limit else f"it took longer than {limit:.0f} s"
            yield failed(f"{over} and was ended")
        except EOFError:
            process.join()
            if process.exitcode != child.RESTART:
                yield failed(_last_words(process.exitcode or 0, errors.read()))
        finally:
            process.kill()
            process.join()


def _last_words(code: int, printed: bytes) -> str:
    lines = printed.decode(errors="replace").strip().splitlines()
    words = next((line for line in reversed(lines) if "rror: " in line), lines[-1] if lines else "")
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return f"its process ended by {how}" + (f": {words.strip()}" if words else "")
