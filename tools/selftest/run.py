"""Running the groups of checks, each in a process of its own, so that a kernel that crashes, hangs or leaves its GPU
unusable fails one check alone. This side imports no torch; the other is `tools.selftest.__main__`.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError, ModelError, PilotfishError
from pilotfish.tools.selftest.check import Result
from pilotfish.tools.selftest.environment import Environment

GROUPS = ("kernels", "attention", "sampling", "logits", "text", "graphs", "parallel", "speed")
"""The modules of `tools.selftest` that have checks, in the order in which they run."""
ENVIRONMENT = "environment"
"""The group that has no checks, but describes the machine."""
LIMIT = 600.0
"""Seconds that a check may take."""
COMMAND = (sys.executable, "-m", "pilotfish.tools.selftest")
RESTART = 75
"""Exit status of a process whose device is unusable, after it has reported its last check."""


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one run of the self-test; sent to the groups' processes."""

    config: EngineConfig
    directory: str
    """Folder in which small models may be written."""
    own_model: bool = False
    """Whether the user named a model: `config.model` is then tested, too."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids for the texts of the user's model. Empty where it has no tokenizer: random ones are used instead."""
    quick: bool = False


class GroupRun(msgspec.Struct, frozen=True, kw_only=True):
    """The line that a group's process reads from its standard input."""

    test: SelfTest
    group: str
    done: tuple[str, ...] = ()
    """Checks that have their results already."""


class Started(msgspec.Struct, frozen=True, tag=True):
    name: str


class Done(msgspec.Struct, frozen=True, tag=True):
    result: Result


class Described(msgspec.Struct, frozen=True, tag=True):
    environment: Environment


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Nothing can be checked with these settings or this model."""

    message: str
    setting: bool
    """Whether a setting is wrong; otherwise it is the model."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """There are no more checks."""


Message = Started | Done | Described | Refused | Ended
OnStart = Callable[[str, str], object]
"""Called with a check's group and name."""


def describe(test: SelfTest) -> Environment:
    """Describe this machine. Raises ConfigError or ModelError where nothing can be checked with the test's settings."""
    for item in _in_process(GroupRun(test=test, group=ENVIRONMENT), lambda group, name: None, LIMIT):
        if isinstance(item, Environment):
            return item
        if item is not None:
            raise PilotfishError(f"the self-test cannot start: {item.detail}")
    raise AssertionError


def run_groups(test: SelfTest, on_start: OnStart, limit: float = LIMIT) -> Iterator[Result]:
    """Yield the results of all checks. Raises ConfigError or ModelError for settings that cannot work."""
    for group in GROUPS:
        done: tuple[str, ...] = ()
        again = True
        while again:
            again = False
            for item in _in_process(GroupRun(test=test, group=group, done=done), on_start, limit):
                if isinstance(item, Result):
                    yield item
                    # The rest of the group gets another process if this one ends early, unless no check was started.
                    again = item.name != group
                    done = (*done, item.name)
                else:
                    again = False


def _in_process(run: GroupRun, on_start: OnStart, limit: float) -> Iterator[Result | Environment | None]:
    """Yield what a group's process reports; None at its proper end.

    A check during which the process ends or takes too long has failed. Before the first check, the failure is a result
    with the group's name.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(run) + b"\n")
            process.stdin.flush()  # and stays open: its end tells the process that this one has gone
            current = run.group
            for message in _messages(process.stdout, limit):
                match message:
                    case Started(name):
                        current = name
                        on_start(run.group, name)
                    case Done(result):
                        yield result
                    case Described(environment):
                        yield environment
                    case Refused(text, setting):
                        raise ConfigError(text) if setting else ModelError(text)
                    case Ended():
                        yield None
                        return
                    case None:
                        yield _failed(run.group, current, f"it took longer than {limit:.0f} s and was ended")
                        return
            code = process.wait()
            if code != RESTART:
                yield _failed(run.group, current, _last_words(code, errors))
        finally:
            process.kill()
            process.wait()


def _failed(group: str, name: str, reason: str) -> Result:
    return Result(group=group, name=name, verdict="failed", detail=reason)


def _last_words(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    words = next((line for line in reversed(lines) if "rror: " in line), lines[-1] if lines else "")
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return f"its process ended by {how}" + (f": {words.strip()}" if words else "")


def _messages(pipe: IO[bytes], limit: float) -> Iterator[Message | None]:
    """Yield a process's messages; None, as the last one, where nothing comes for `limit` seconds."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in pipe:
            lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    decoder = msgspec.json.Decoder(Message)
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield decoder.decode(line)
