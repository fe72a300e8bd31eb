"""Devices, in the few ways in which the engine cares about them, and getting small tensors there."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

import torch


def on_device(values: torch.Tensor | Seq[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A host tensor, or one of these numbers, on `device`; the host does not wait for a GPU to have it.

    torch.tensor(values, device="cuda") would: it copies out of pageable memory, behind all that is running there.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, such as (9, 0) for Hopper; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


class PassTimer:
    """Measures how long a pass of the model takes on its device: on the CPU the launch, which returns when all is done;
    on a GPU the time between two events in its stream, as the host is elsewhere meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._began = self._launched = 0.0

    def begin(self) -> None:
        """Just before the pass is launched."""
        self._began = time.perf_counter()
        if self._events is not None:
            self._events[0].record()

    def launched(self) -> None:
        if self._events is not None:
            self._events[1].record()
        self._launched = time.perf_counter()

    def seconds(self) -> float:
        """Seconds that the last pass took; waits for it."""
        if self._events is None:
            return self._launched - self._began
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000

    def elapsed(self) -> float:
        """Seconds since `begin`."""
        return time.perf_counter() - self._began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back_memory(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory without using it, for others to count it as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
