"""Running the groups of checks, each in a process of its own: a kernel that crashes, hangs or leaves its GPU unusable
fails one check and spoils no other. This side of it knows no torch; the other is `tools.selftest.__main__`.
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
ENVIRONMENT = "environment"
"""Not checks, but what the machine is."""
LIMIT = 600.0
"""Seconds that a check may take."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is asked for. Crosses to the processes that the groups run in."""

    config: EngineConfig
    directory: str
    """Where small models may be written."""
    own_model: bool = False
    """The user named a model: `config.model` is tested, too."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids, for the texts of the user's model; without a tokenizer there are none, and random ones do."""
    quick: bool = False


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What such a process is started with: a line on its standard input."""

    job: Job
    group: str
    done: tuple[str, ...] = ()
    """Checks that need not be made again."""


class Started(msgspec.Struct, frozen=True, tag=True):
    name: str


class Done(msgspec.Struct, frozen=True, tag=True):
    result: Result


class Described(msgspec.Struct, frozen=True, tag=True):
    environment: Environment


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Nothing can be checked with these settings."""

    message: str
    setting: bool
    """It is a setting's fault, and not the model's."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """There are no more checks."""


Message = Started | Done | Described | Refused | Ended
OnStart = Callable[[str, str], object]
"""Told a check's group and name."""


def describe(job: Job) -> Environment:
    """What this machine is. Raises ConfigError or ModelError where nothing can be checked with the job's settings."""
    for item in _in_process(Launch(job=job, group=ENVIRONMENT), lambda group, name: None, LIMIT):
        if isinstance(item, Environment):
            return item
        if item is not None:
            raise PilotfishError(f"the self-test cannot start: {item.detail}")
    raise AssertionError


def run_groups(job: Job, on_start: OnStart, limit: float = LIMIT) -> Iterator[Result]:
    """The results of all checks, as they come. Raises ConfigError or ModelError for settings that cannot work."""
    for group in GROUPS:
        done: tuple[str, ...] = ()
        again = True
        while again:
            again = False
            for item in _in_process(Launch(job=job, group=group, done=done), on_start, limit):
                if isinstance(item, Result):
                    yield item
                    # A process that has gone is followed by another for what is left, unless it did not get that far.
                    again = item.name != group
                    done = (*done, item.name)
                else:
                    again = False


def _in_process(launch: Launch, on_start: OnStart, limit: float) -> Iterator[Result | Environment | None]:
    """What comes of a process; None at its proper end.

    The check during which it goes down or takes too long has failed; before the first, that is a result of the group's
    own name.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pilotfish.tools.selftest"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(launch) + b"\n")
            process.stdin.flush()  # and stays open: its end tells the process that this one has gone
            current = launch.group
            for message in _messages(process.stdout, limit):
                match message:
                    case Started(name):
                        current = name
                        on_start(launch.group, name)
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
                        yield _failed(launch.group, current, f"it took longer than {limit:.0f} s and was ended")
                        return
            code = process.wait()
            if code != RESTART:
                yield _failed(launch.group, current, _last_words(code, errors))
        finally:
            process.kill()
            process.wait()


RESTART = 75
"""Exit status of a process whose device is of no more use; its last check has been told."""


def _failed(group: str, name: str, reason: str) -> Result:
    return Result(group=group, name=name, verdict="failed", detail=reason)


def _last_words(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    words = next((line for line in reversed(lines) if "rror: " in line), lines[-1] if lines else "")
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return f"its process ended by {how}" + (f": {words.strip()}" if words else "")


def _messages(pipe: IO[bytes], limit: float) -> Iterator[Message | None]:
    """None, once and at last, where nothing comes for `limit` seconds."""
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
