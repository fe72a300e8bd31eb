"""Timing actions on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from pilotfish.engine.device import synchronize

WARM_UP = 3


def seconds_of(device: torch.device, action: Callable[[], object]) -> float:
    """Return the seconds of an action until the device has finished it."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin


def median_seconds(device: torch.device, action: Callable[[], object], times: int) -> float:
    """Return the median seconds of an action; the first WARM_UP runs do not count."""
    return statistics.median([seconds_of(device, action) for _ in range(times + WARM_UP)][WARM_UP:])
