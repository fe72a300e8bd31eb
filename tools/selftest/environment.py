"""Environment: this machine and its software, as far as they matter to the checks."""

from __future__ import annotations

import os
import platform as host
from importlib import metadata
from typing import TYPE_CHECKING

import msgspec
import psutil

if TYPE_CHECKING:
    from pilotfish.engine.execution.platform import Platform

PACKAGES = ("torch", "flash-attn", "flash-attn-4", "triton", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "transformers")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    memory: int
    """Bytes."""
    free: int
    """Bytes that were free at the start."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    system: str
    processor: str
    cores: int
    """Cores that this process may use."""
    memory: int
    """Bytes of the host's memory."""
    python: str
    packages: dict[str, str]
    """Versions of the installed ones of PACKAGES."""
    device: str
    """The device on which models compute with these settings: "cuda:0", "cpu"."""
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
    """The output of `nvidia-smi topo -m`."""


def read_environment(platform: Platform) -> Environment:
    """Describe this machine; `platform` is what the settings choose for a model."""
    import torch

    from pilotfish.engine.device.gpu import driver_version, nvidia_smi

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for i in range(count):
        properties, (free, memory) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(name=properties.name, capability=capability, memory=memory, free=free))
    return Environment(
        system=host.platform(),
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        python=host.python_version(),
        packages=_versions(),
        device=str(platform.device),
        dtype=str(platform.dtype).removeprefix("torch."),
        kernels=platform.kernels_name,
        cuda=torch.version.cuda,
        driver=driver_version(),
        gpus=tuple(gpus),
        peers=tuple(
            tuple(i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)) for i in range(count)
        ),
        topology=nvidia_smi("topo", "-m") if count > 1 else None,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return host.processor() or host.machine()
