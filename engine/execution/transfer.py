"""From the host to the device, without waiting for it: what belongs together in one copy.

To wait for a copy is to wait for everything that the device has been given before it, which is the whole forward pass.
Copies out of pinned memory need no waiting; torch's caching allocator for it reuses no buffer before its copy is done.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.device import on_device

ALIGNMENT = 16
"""Bytes: an array begins at a multiple of it, more than any kernel asks of ids and lengths."""


def to_device(buffer: np.ndarray, device: torch.device) -> torch.Tensor:
    """The buffer, (bytes,) uint8, on `device`; on the CPU it is the same memory."""
    return on_device(torch.from_numpy(buffer), device)
