"""A stand-in for the process of a group of four checks, whose name says what happens at the second one."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from pilotfish.tools.selftest.check import Check, Finding, run_check


def main(parent: Connection, errors: str, test: object, group: str, done: tuple[str, ...]) -> None:
    file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("a", "b", "c", "d"):
        if name in done:
            continue
        parent.send(name)
        if name == "b":
            match group:
                case "abort":
                    os.abort()
                case "exit":
                    os._exit(3)
                case "raise":
                    raise RuntimeError("lost")
                case "sleep":
                    time.sleep(600)
        parent.send(run_check(Check(name, "", lambda: Finding(measured=0, bound=0)), group))
    parent.send(None)
