"""Device: the rates and the memory of one GPU, or of a machine's CPU; and the devices that are known by name.

Published peaks come from the makers' data sheets, and no kernel reaches them: `bandwidth_share` and `flops_share` say
which share of them the planner expects. A measured device (benchmarks/measure_device.py writes one) has shares of 1 and
a rate for each number of rows instead. A JSON file with these fields describes a device, too.
"""

from __future__ import annotations

import difflib
from importlib import resources
from itertools import pairwise
from pathlib import Path

import msgspec

from pilotfish.errors import ConfigError

GIGA, TERA, MIB = 1e9, 1e12, 2**20


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    source: str
    """The origin of the figures."""
    memory: int
    """Bytes, as the driver reports them."""
    bandwidth: float
    """Bytes per second at which that memory is read."""
    flops: dict[str, float]
    """Dense FLOP per second, by the dtype of the operands; other dtypes are computed in 16 bits or refused."""
    link_bandwidth: float = 0.0
    """Bytes per second to the other GPUs, in one direction; 0: there are none."""
    link_latency: float = 0.0
    """Seconds of latency of a message over that link."""
    bandwidth_share: float = 1.0
    """The share of `bandwidth` that a kernel reaches when it streams weights."""
    flops_share: float = 1.0
    """The share of `flops` that a kernel reaches on large matrices."""
    link_share: float = 1.0
    """The share of `link_bandwidth` that a large all-reduce reaches."""
    flops_by_rows: dict[int, float] = {}
    """Measured FLOP per second by the number of rows, weights streamed from memory; empty: `flops` for any number."""
    attention_flops: float = 0.0
    """Measured FLOP per second of attention over cached keys; 0: the rate of matrices."""
    kernel_seconds: float = 0.0
    """Seconds of overhead for each kernel in a row: launch or replay, and its first bytes."""
    gated_products: bool = False
    """Whether products of few rows have the activation that follows them (`engine.kernels.few`)."""
    row_bandwidth: float = 0.0
    """Bytes per second of row-wise operators (norms, rotations, activations); 0: `bandwidth`."""
    step_seconds: float = 0.0
    """Seconds of the engine's own work in a step: plan, tensors in, tokens out, commit."""
    sequence_seconds: float = 0.0
    """Seconds of the engine's own work for each sequence of a step, on top."""
    logit_seconds: float = 0.0
    """Seconds for drawing a token from a row of logits, for each entry of the vocabulary."""
    draft_seconds: float = 0.0
    """Seconds of the engine's own work in a pass of a draft model."""
    reserved: int = 0
    """Bytes that models cannot use: context, libraries' workspaces, communication buffers."""
    graphs: bool = True
    """Whether passes run as CUDA graphs, which take memory."""
    threads: int = 0
    """CPU threads that it was measured with; 0 for a GPU."""

    def check(self) -> Device:
        """Return self. Raises ConfigError for impossible figures."""
        for name in ("memory", "bandwidth"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"device {self.name!r}: {name} is {getattr(self, name)}, but must be above 0")
        for name in ("bandwidth_share", "flops_share", "link_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"device {self.name!r}: {name} is {getattr(self, name)}, but must be in (0, 1]")
        if not self.flops or min([*self.flops.values(), *self.flops_by_rows.values()]) <= 0:
            raise ConfigError(f"device {self.name!r}: flops must have a rate above 0 for at least one dtype")
        return self

    def rate(self, dtype: str, rows: int) -> float:
        """Return the FLOP per second of a matrix product of so many rows with operands of `dtype`. Raises ConfigError
        for a dtype that the device does not compute in."""
        if self.flops_by_rows:
            return _between(self.flops_by_rows, rows)
        if dtype not in self.flops:
            raise ConfigError(f"{self.name} does not compute in {dtype}: it has {', '.join(self.flops)}")
        return self.flops[dtype] * self.flops_share


def _between(measured: dict[int, float], rows: int) -> float:
    """Interpolate the rate at `rows`, linearly in seconds; beyond the last measured count the rate stays the same."""
    counts = sorted(measured)
    if rows <= counts[0]:
        return measured[counts[0]] * rows / counts[0]  # a pass takes as long as that of the fewest rows
    for low, high in pairwise(counts):
        if rows <= high:
            seconds = [low / measured[low], high / measured[high]]
            share = (rows - low) / (high - low)
            return rows / (seconds[0] + share * (seconds[1] - seconds[0]))
    return measured[counts[-1]]


NVLINK, PCIE = 2e-6, 5e-6
"""Seconds of latency of a message."""


def _gpu(
    name: str,
    source: str,
    mib: int,
    terabytes: float,
    link: tuple[float, float],
    gated_products: bool = False,
    /,
    **teraflops: float,
) -> Device:
    """Return a GPU by its data sheet; shares and overheads are the planner's assumptions, the same for all.

    terabytes: memory bandwidth, TB/s; link: GB/s in one direction, and seconds of latency.
    """
    return Device(
        name=name,
        source=source,
        memory=mib * MIB,
        bandwidth=terabytes * TERA,
        flops={dtype: rate * TERA for dtype, rate in teraflops.items()},
        link_bandwidth=link[0] * GIGA,
        link_latency=link[1],
        bandwidth_share=0.8,
        flops_share=0.7,
        link_share=0.8,
        kernel_seconds=1.5e-6,
        gated_products=gated_products,
        step_seconds=0.5e-3,
        sequence_seconds=10e-6,
        draft_seconds=0.05e-3,
        reserved=1536 * MIB,
    )


_HOPPER = {"fp8": 1979, "bfloat16": 989, "float16": 989, "float32": 67}
_BLACKWELL = {"fp8": 4500, "bfloat16": 2250, "float16": 2250, "float32": 75}
_AMPERE = {"bfloat16": 312, "float16": 312, "float32": 19.5}
_L40S = {"fp8": 733, "bfloat16": 362, "float16": 362, "float32": 91.6}
_L4 = {"fp8": 242, "bfloat16": 121, "float16": 121, "float32": 30.3}
_RTX4090 = {"fp8": 330.3, "bfloat16": 165.2, "float16": 165.2, "float32": 82.6}

DEVICES = {
    device.name: device
    for device in (
        _gpu("b200", "NVIDIA HGX B200 data sheet", 183359, 8.0, (900, NVLINK), **_BLACKWELL),
        _gpu("h200", "NVIDIA H200 SXM data sheet", 143771, 4.8, (450, NVLINK), True, **_HOPPER),
        _gpu("h100", "NVIDIA H100 SXM5 80 GB data sheet", 81559, 3.35, (450, NVLINK), True, **_HOPPER),
        _gpu("a100", "NVIDIA A100 SXM4 80 GB data sheet", 81920, 2.039, (300, NVLINK), **_AMPERE),
        _gpu("l40s", "NVIDIA L40S data sheet; PCIe 4.0 x16", 46068, 0.864, (32, PCIE), **_L40S),
        _gpu("l4", "NVIDIA L4 data sheet; PCIe 4.0 x16", 23034, 0.3, (32, PCIE), **_L4),
        _gpu("rtx4090", "NVIDIA Ada GPU architecture paper; PCIe 4.0 x16", 24564, 1.008, (32, PCIE), **_RTX4090),
    )
}
CPU = "cpu"


def find_device(name: str) -> Device:
    """Return a device by name ("h100", "cpu") or from a JSON file. Raises ConfigError for an unknown one."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    if name.lower() == CPU:
        return _read(resources.files("pilotfish.tools.planner").joinpath("cpu.json").read_bytes(), "cpu.json")
    path = Path(name)
    if path.suffix == ".json":
        try:
            return _read(path.read_bytes(), name)
        except OSError as error:
            raise ConfigError(f"cannot read the device in {name}: {error.strerror}") from error
    known = [*DEVICES, CPU]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"gpu is {name!r}: {hint}known are {', '.join(known)}, and a .json file such as "
        "benchmarks/measure_device.py writes"
    )


def _read(content: bytes, where: str) -> Device:
    try:
        return msgspec.json.decode(content, type=Device).check()
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ConfigError(f"{where} does not describe a device: {error}") from error
