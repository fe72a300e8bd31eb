"""Which device a rank computes on."""

from __future__ import annotations

import socket

import msgspec
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.platform import thread_count
from pilotfish.engine.ranks.topology import Topology
from pilotfish.errors import ConfigError


def assign_device(config: EngineConfig, topology: Topology) -> tuple[EngineConfig, torch.device]:
    """Give a rank its host's GPU of its number, or its share of the cores. Returns the settings with this rank's
    threads, and the device. Raises ConfigError for a host with fewer GPUs than ranks."""
    if config.device != "cpu" and torch.cuda.is_available():
        there = torch.cuda.device_count()
        if there < topology.local_size:
            raise ConfigError(
                f"tensor_parallel_size is {topology.size} on {topology.nnodes} host(s), which takes "
                f"{topology.local_size} GPUs of each, but torch sees {there} on {socket.gethostname()}"
            )
        torch.cuda.set_device(topology.local_rank)
        return config, torch.device("cuda", topology.local_rank)
    threads = config.num_threads or max(1, thread_count(config) // topology.local_size)
    return msgspec.structs.replace(config, num_threads=threads), torch.device("cpu")
