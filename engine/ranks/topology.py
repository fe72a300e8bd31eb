"""Which ranks there are, and where they find each other. No torch."""

from __future__ import annotations

import socket

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError


def ranks_per_host(config: EngineConfig) -> int:
    """Hosts have the same number of ranks each, in order."""
    return config.tensor_parallel_size // config.nnodes


def ranks_of(config: EngineConfig) -> range:
    """The ranks of this host."""
    first = config.node_rank * ranks_per_host(config)
    return range(first, first + ranks_per_host(config))


def control_endpoint(config: EngineConfig) -> str:
    """Where several hosts find the leader's end of the control channel."""
    return f"tcp://{bracketed(config.master_addr or '')}:{config.master_port}"


def addresses_of(master: str) -> list[str]:
    """IP addresses of node 0. Raises ConfigError where it has none."""
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"master_addr is {master!r}, which has no address here: {error}") from error
    return [str(address[0]) for *_, address in found]


def listening_address(master: str) -> str:
    """What to listen on to be reached at `master`: that address where it is one of this machine's, else "*" for all of
    them, as where it is the name of a service in front of it."""
    for address in addresses_of(master):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.create_server((address, 0), family=family):
                return bracketed(address)
        except OSError:
            continue
    return "*"


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host
