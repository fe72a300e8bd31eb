"""The checks of each group, and running them in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from pilotfish.tools.selftest import attention, graphs, kernels, logits, parallel, sampling, speed, text
from pilotfish.tools.selftest.check import Check, Result, run_check
from pilotfish.tools.selftest.run import GROUPS, Job
from pilotfish.tools.selftest.subject import Subject

CHECKS: dict[str, Callable[[Subject], Iterator[Check]]] = {
    module.GROUP: module.checks for module in (kernels, attention, sampling, logits, text, graphs, parallel, speed)
}
assert tuple(CHECKS) == GROUPS


def run_group(job: Job, group: str, done: Collection[str], on_start: Callable[[str], object]) -> Iterator[Result]:
    """Results of a group's checks but those in `done`. Raises ConfigError or ModelError where there can be none."""
    for check in CHECKS[group](Subject(job)):
        if check.name not in done:
            on_start(check.name)
            yield run_check(check)


def device_is_lost() -> bool:
    """After an error that ends a GPU's context every call fails, whoever makes it."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
