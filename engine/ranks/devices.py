"""Assigns each rank its device."""

from __future__ import annotations

import socket

import msgspec
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device.gpu import use_gpu
from pilotfish.engine.execution.platform import thread_count
from pilotfish.engine.ranks.topology import ranks_per_host
from pilotfish.errors import ConfigError


def assign_device(config: EngineConfig, rank: int) -> tuple[EngineConfig, torch.device]:
    """Assign a rank the GPU of its index on the host, or its share of the cores. Returns the settings with this rank's
    threads, and the device. Raises ConfigError for a host with fewer GPUs than ranks, or one whose GPUs torch cannot
    use."""
    local_size = ranks_per_host(config)
    if use_gpu(config.device):
        there = torch.cuda.device_count()
        if there < local_size:
            raise ConfigError(
                f"tensor_parallel_size is {config.tensor_parallel_size} on {config.nnodes} host(s), which takes "
                f"{local_size} GPUs of each, but torch sees {there} on {socket.gethostname()}"
            )
        torch.cuda.set_device(rank % local_size)
        return config, torch.device("cuda", rank % local_size)
    threads = config.num_threads or max(1, thread_count(config) // local_size)
    return msgspec.structs.replace(config, num_threads=threads), torch.device("cpu")
