"""Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): a
kernel is launched while the one in front of it still runs, and waits itself until that has ended.

What a launch costs, and what a kernel can do before it needs another's results, then happens beside that one. It is
safe as long as every kernel that is launched so waits (`triton_rows.follow`) before it reads or writes anything that is
not constant: its end then implies the end of all before it, for whatever is launched after it, of other libraries, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MOST_ROWS = 64
"""Most rows of what is launched so: with more, kernels are many programs, each of which waits for itself. A prompt of
512 tokens took 4 % longer on an H200."""

Launch = Mapping[str, Any]
PLAIN: Launch = {"DEPENDENT": False}


def may_depend(device: torch.device) -> bool:
    """Whether the device has such launches: from compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(dependent: bool) -> Launch:
    """What a launch of a Triton kernel with a parameter DEPENDENT is given."""
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else PLAIN


def for_rows(launch: Launch, rows: int) -> Launch:
    """`launch` itself for few rows."""
    return launch if rows <= MOST_ROWS else PLAIN
