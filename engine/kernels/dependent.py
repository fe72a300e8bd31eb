"""Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): a
kernel is launched while the one in front of it still runs, and waits itself until that has ended.

What a launch costs, and what a kernel can do before it needs another's results, then happens beside that one. It is
safe as long as every kernel that is launched so waits (`triton_rows.follow`) before it reads or writes anything that is
not constant: its end then implies the end of all before it, for whatever is launched after it, of other libraries, too.
"""

from __future__ import annotations

from typing import Any

import torch


def may_depend(device: torch.device) -> bool:
    """Whether the device has such launches: from compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(dependent: bool) -> dict[str, Any]:
    """What a launch of a Triton kernel with a parameter DEPENDENT is given."""
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}
