"""Helpers for devices: copying small tensors to them, compute capability, timing, waiting, and freeing memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch


def on_device(values: torch.Tensor | Seq[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a host tensor, or a tensor of these numbers, to `device` without waiting for a GPU.

    torch.tensor(values, device="cuda") would wait: it copies from pageable memory, behind all that is queued there.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, such as (9, 0) for Hopper; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device's memory; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class PassTimer:
    """Measures how long a pass of the model takes: on the CPU the launch, which returns when all is done; on a GPU the
    time between two events in its stream, while the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._began = self._launched = 0.0

    def begin(self) -> None:
        """Call it just before the pass is launched."""
        self._began = time.perf_counter()
        if self._events is not None:
            self._events[0].record()

    def launched(self) -> None:
        """Call it once the pass is launched."""
        if self._events is not None:
            self._events[1].record()
        self._launched = time.perf_counter()

    def seconds(self) -> float:
        """Wait for the last pass; return the seconds that it took."""
        if self._events is None:
            return self._launched - self._began
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000

    def elapsed(self) -> float:
        """Seconds since `begin`."""
        return time.perf_counter() - self._began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that is queued there; on the CPU nothing ever is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """The bytes that `work` takes of a GPU's memory, at most, beyond what is taken already; it may leave nothing behind
    but what later work finds there (compiled kernels, workspaces). On other devices it is not done, and the result 0.
    """
    if device.type != "cuda":
        return 0
    give_back_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    work()
    synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    give_back_memory(device)
    return peak - before


def give_back_memory(device: torch.device) -> None:
    """Free the GPU memory that torch caches without using it, so that it counts as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
