"""Ports for servers that are told theirs before they listen."""

from __future__ import annotations

import itertools
import os
import socket

# Below what Linux hands out itself (ip_local_port_range), so that between the look and the server's own bind no
# connection takes it; where the search begins depends on the process, so that tests beside this one look elsewhere.
_candidates = itertools.cycle(range(20_000, 30_000))
_first = next(port for port in _candidates if port == 20_000 + os.getpid() * 37 % 10_000)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that this function has not given out lately."""
    for port in _candidates:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("cycle() does not end")
