"""The ranks of each host, and the addresses at which they find each other. No torch."""

from __future__ import annotations

import socket

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError


def ranks_per_host(config: EngineConfig) -> int:
    """The number of ranks of each host; hosts have consecutive ranks."""
    return config.tensor_parallel_size // config.nnodes


def ranks_of(config: EngineConfig) -> range:
    """The ranks of this host."""
    first = config.node_rank * ranks_per_host(config)
    return range(first, first + ranks_per_host(config))


def control_endpoint(config: EngineConfig) -> str:
    """Address of the control channel for several hosts."""
    return f"tcp://{bracketed(config.master_addr or '')}:{config.master_port}"


def addresses_of(master: str) -> list[str]:
    """IP addresses of node 0. Raises ConfigError if it has none."""
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"master_addr is {master!r}, which has no address here: {error}") from error
    return [str(address[0]) for *_, address in found]


def listening_address(master: str) -> str:
    """The address to listen on to be reached at `master`: its own if it is this machine's, else "*" for all."""
    for address in addresses_of(master):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.create_server((address, 0), family=family):
                return bracketed(address)
        except OSError:
            continue
    return "*"


def bracketed(host: str) -> str:
    """A host as it is written before a port."""
    return f"[{host}]" if ":" in host else host
