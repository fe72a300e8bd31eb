"""Whether to compute on a GPU: what torch can use, against what this machine says that it has.

A server that falls back to the CPU beside a GPU that torch cannot use looks healthy and is hundreds of times too slow.
So that is an error, unless the CPU was asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from pilotfish.errors import ConfigError, one_line

NOT_GIVEN = ("", "void", "none")
"""Values of NVIDIA_VISIBLE_DEVICES for a container without a GPU (NVIDIA container toolkit)."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; the last one is Slurm's."""
SMI_SECONDS = 20.0
"""Time that nvidia-smi may take: without its daemon it first wakes the driver."""


def use_gpu(device: str) -> bool:
    """Return whether to compute on a GPU. device: "auto", "cpu" or "cuda", as asked for.

    Raises ConfigError if "cuda" is asked for and torch sees no GPU, or if anything but "cpu" is and the machine has a
    GPU that torch cannot use.
    """
    if device == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    problem = unusable_gpu()
    if problem is None and device == "cuda":
        problem = f"no GPU was found here, and torch {torch.__version__} says: {why_torch_sees_none()}"
    if problem is None:
        return False
    raise ConfigError(f"device is {device!r}, but {problem}. With device 'cpu' it runs on the CPU")


def unusable_gpu() -> str | None:
    """What is wrong, if this machine has a GPU and torch, which sees none, cannot use it: torch's reason, and the
    driver's version. None if there is no sign of a GPU, or CUDA_VISIBLE_DEVICES hides it."""
    if (sign := sign_of_gpu(os.environ)) is None:
        return None
    version = driver_version()
    driver = f"the driver's version is {version}" if version else "no driver was found"
    return f"{sign}, and torch {torch.__version__} cannot use it: {why_torch_sees_none()}; {driver}"


def sign_of_gpu(environment: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """What says that this machine has a GPU that this process is meant to see, or None. root: of the file system."""
    if environment.get("CUDA_VISIBLE_DEVICES", "all") in HIDDEN:
        return None
    if nodes := sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*")):
        return f"this machine has a GPU (/dev/{nodes[0]})"
    if (listed := nvidia_smi("--list-gpus")) and (line := re.search(r"^GPU \d+: .*?(?= \(UUID|$)", listed, re.M)):
        return f"this machine has a GPU (nvidia-smi: {line[0]})"
    asked = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    if asked not in NOT_GIVEN:
        return (
            f"this container is meant to have a GPU (NVIDIA_VISIBLE_DEVICES is {asked!r}), but has no /dev/nvidia0 "
            "(was it started with --gpus all, or with a GPU among its resources?)"
        )
    return None


def why_torch_sees_none() -> str:
    """Torch's own reason for seeing no GPU, on one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter from a build for the CPU
        return one_line(error)
    return "it counts no CUDA device"


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's driver, such as "580.95.05"; None without one. root: of the file system."""
    try:
        stated = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        stated = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or ""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", stated)
    return found[0] if found else None


def nvidia_smi(*arguments: str) -> str | None:
    """The output of nvidia-smi, or None if it is not installed or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
