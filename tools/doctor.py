"""What `pilotfish doctor` finds out: this machine as far as it matters to speed, and what would make it faster."""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib import metadata
from typing import Literal

import msgspec
import psutil
import torch

from pilotfish.engine.device.gpu import driver_version, unusable_gpu
from pilotfish.errors import one_line
from pilotfish.tools.selftest.environment import processor

PACKAGES = ("torch", "transformers", "triton", "flash-attn", "flash-attn-4")
LEVELS = ("the compiler's default", "AVX2", "AVX-512")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "sve")
BYTES = 2**28
"""Size of what is read to measure the memory: larger than caches."""
SCARCE = 2 * 2**30
"""Bytes of free memory below which a model hardly fits."""

Verdict = Literal["ok", "advice", "wrong"]


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    what: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""
    """What to do, unless it is ok."""


def examine() -> list[Finding]:
    """Return the findings, after a second of measuring."""
    return [*_host(), *_kernels(), *_torch(), *_gpus()]


def _host() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory, load = psutil.virtual_memory(), os.getloadavg()[0]
    flags = _flags()
    bandwidth = memory_bandwidth()
    found = [name for name in SETS if name in flags]
    busy = load > 1.5 * cores
    scarce = memory.available < SCARCE
    return [
        Finding("processor", f"{processor()}, {platform.machine()}"),
        Finding(
            "cores",
            f"{cores} for this process, load {load:.1f}",
            "advice" if busy else "ok",
            "other programs use the cores: decoding will be slow while they run" if busy else "",
        ),
        Finding("instruction sets", ", ".join(found) or "none that the kernels use"),
        Finding(
            "memory",
            f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            "advice" if scarce else "ok",
            "free some, or choose a smaller model or --quantization" if scarce else "",
        ),
        Finding(
            "memory bandwidth",
            f"{bandwidth / 1e9:.1f} GB/s: plain decoding reads all weights for each token, so a model of 1 GB makes at "
            f"most {bandwidth / 1e9:.0f} tokens/s on the CPU",
        ),
    ]


def _kernels() -> list[Finding]:
    from pilotfish.engine.kernels.native import NativeKernels

    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    findings = [Finding("compiler", compiler or "none")]
    try:
        level = NativeKernels().level
    except Exception as error:  # not built, or not for this processor: each means the same here
        todo = "" if compiler else "install a C compiler (apt install gcc), and then "
        advice = f"{todo}install Pilotfish again: torch's operators are slower, and not batch-invariant"
        return [*findings, Finding("CPU kernels", one_line(error), "advice", advice)]
    return [*findings, Finding("CPU kernels", f"built, with {LEVELS[min(level, 2)]}")]


def _torch() -> list[Finding]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return [
        Finding("packages", ", ".join(versions)),
        Finding("torch", f"built for {build}, {torch.get_num_threads()} threads"),
    ]


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        problem = unusable_gpu()
        if problem is None:
            return [Finding("GPU", "none")]
        advice = "install a torch that is built for this driver's CUDA, or start with --device cpu"
        return [Finding("GPU", problem, "wrong", advice)]
    findings = [Finding("driver", driver_version() or "unknown")]
    for i in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        used = free < 0.9 * total
        findings.append(
            Finding(
                f"GPU {i}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "advice" if used else "ok",
                "other programs hold its memory: the KV cache will be smaller" if used else "",
            )
        )
    return findings


def memory_bandwidth(size: int = BYTES, rounds: int = 4) -> float:
    """Bytes per second at which the cores read memory: the best of some sums over `size` bytes."""
    data = torch.ones(size // 4, dtype=torch.float32)
    data.sum()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def _flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith(("flags", "features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
