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


def device_seconds(device: torch.device, action: Callable[[], object], times: int) -> tuple[float, float]:
    """Return the median seconds of an action on the device, by CUDA events, and until the host has launched it. On the
    CPU they are the same. The first WARM_UP runs do not count."""
    if device.type != "cuda":
        seconds = median_seconds(device, action, times)
        return seconds, seconds
    found, launched = [], []
    for _ in range(times + WARM_UP):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        started = time.perf_counter()
        begin.record()
        action()
        end.record()
        launched.append(time.perf_counter() - started)
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found[WARM_UP:]), statistics.median(launched[WARM_UP:])
