"""What a device is, in the few ways in which the engine cares; and getting small tensors there."""

from __future__ import annotations

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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back_memory(device: torch.device) -> None:
    """What torch keeps of a GPU's memory without using it, for others to count it as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
