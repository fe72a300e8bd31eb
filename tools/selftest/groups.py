"""Describing the machine, and running the checks of a group, in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from importlib import import_module

import torch

from pilotfish.tools.selftest.check import Result, run_check
from pilotfish.tools.selftest.environment import Environment, read_environment
from pilotfish.tools.selftest.settings import SelfTest
from pilotfish.tools.selftest.subject import Subject


def describe_here(test: SelfTest) -> Environment:
    """Describe this machine. Raises ConfigError or ModelError where nothing can be checked with the test's settings."""
    subject = Subject(test)
    subject.check()
    return read_environment(subject.platform)


def run_group(test: SelfTest, group: str, done: Collection[str], on_start: Callable[[str], object]) -> Iterator[Result]:
    """Yield the results of a group's checks, leaving out those in `done`. `on_start` is called with each check's name.

    Raises ConfigError or ModelError where the group's checks cannot even be listed.
    """
    module = import_module(f"pilotfish.tools.selftest.{group}")
    for check in module.checks(Subject(test)):
        if check.name not in done:
            on_start(check.name)
            with torch.inference_mode():
                result = run_check(check, group)
            yield result


def device_is_lost() -> bool:
    """Return whether the GPU's context is broken: every call fails then, whoever makes it."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
