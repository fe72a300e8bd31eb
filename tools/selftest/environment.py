"""Environment: what this machine and its software are, as far as it explains what the checks find."""

from __future__ import annotations

import os
import platform as host
import shutil
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING

import msgspec
import psutil

if TYPE_CHECKING:
    from pilotfish.engine.execution.loader import Platform

PACKAGES = ("torch", "flash-attn", "flash-attn-4", "triton", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "transformers")
SECONDS = 20.0
"""That nvidia-smi may take."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    memory: int
    """Bytes."""
    free: int
    """Bytes, at the start."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    system: str
    processor: str
    cores: int
    """That this process may use."""
    memory: int
    """Of the host, bytes."""
    python: str
    packages: dict[str, str]
    """Versions of what is installed of PACKAGES."""
    device: str
    """Where models compute with these settings: "cuda:0", "cpu"."""
    dtype: str
    kernels: str
    """The kernels and attention that these settings choose, as in EngineInfo."""
    cuda: str | None = None
    """The CUDA version that torch was built with."""
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    peers: tuple[tuple[bool, ...], ...] = ()
    """Whether GPU i can read GPU j's memory itself, over NVLink or PCIe."""
    topology: str | None = None
    """What `nvidia-smi topo -m` says."""


def read_environment(platform: Platform) -> Environment:
    """Of this machine; `platform`: where a model computes by the settings."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for i in range(count):
        properties, (free, memory) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(name=properties.name, capability=capability, memory=memory, free=free))
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") if count else None
    return Environment(
        system=host.platform(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        python=host.python_version(),
        packages=_versions(),
        device=str(platform.device),
        dtype=str(platform.dtype).removeprefix("torch."),
        kernels=platform.kernels_name,
        cuda=torch.version.cuda,
        driver=driver.splitlines()[0].strip() if driver else None,
        gpus=tuple(gpus),
        peers=tuple(
            tuple(i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)) for i in range(count)
        ),
        topology=_nvidia_smi("topo", "-m") if count > 1 else None,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return host.processor() or host.machine()


def _nvidia_smi(*arguments: str) -> str | None:
    """What it prints, or None where it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
