"""What connections of clients may take: how many there are, how long a client may keep one waiting, and how large the
head of a request is. `server.http_protocol` keeps to it."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

LARGEST_HEAD = 2**16
"""Bytes of a request line and its headers; more are refused with status 431."""
BODY_RATE = 2**14
"""Bytes of a body for each of which a client has another second, after the first `patience` seconds."""
LINGER_SECONDS = 1.0
"""How long a refused connection stays open for its client to read the answer."""
MOST_LINGERING = 64
SEND_BUFFER = 2**18
"""Bytes that the system takes of answers that a client does not read; further ones wait in this process."""
SPARE_DESCRIPTORS = 32
"""For files, children, and what the system has accepted already."""
MOST_DESCRIPTORS = 2**20
LOG_SECONDS = 10.0
"""Between two lines of a kind in the log."""

_SAID = {
    "limit": "connections were refused: there are as many as max_connections or the limit on open files allows",
    "head": "connections were closed: the head of a request was too long, or took longer than client_timeout",
    "body": "connections were closed: a body came more slowly than client_timeout allows",
    "answer": "connections were cut: their clients read answers more slowly than client_timeout allows",
}


@dataclass(slots=True)
class ConnectionLimits:
    """Limits that all connections of a server share, and the count of those that were ended for them."""

    most: int
    """Connections at a time."""
    patience: float
    """Seconds (see ServerConfig.client_timeout)."""
    idle: float
    """Seconds that a connection may be open without a request."""
    count: Callable[[str], None] = lambda reason: None
    """Called with the reason of each connection that is ended: a key of _SAID."""
    lingering: int = 0
    _unsaid: dict[str, int] = field(default_factory=dict)
    _said: dict[str, float] = field(default_factory=dict)

    def ended(self, reason: str) -> None:
        """Count a connection, and log it unless a line of this kind was logged a moment ago."""
        self.count(reason)
        self._unsaid[reason] = self._unsaid.get(reason, 0) + 1
        now = time.monotonic()
        if now - self._said.get(reason, -LOG_SECONDS) >= LOG_SECONDS:
            logger.warning("%d %s", self._unsaid.pop(reason), _SAID[reason])
            self._said[reason] = now


def most_connections(asked: int) -> int:
    """Return how many connections there may be: `asked`, or less where the limit on open files does not allow as many;
    0 asks for what it allows. The process's limit is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    spare = min(SPARE_DESCRIPTORS, limit // 8)
    allowed = max(1, limit - _open_descriptors() - 2 * spare)
    if asked > allowed:
        logger.warning("max_connections is %d, but the limit on open files, %d, allows %d", asked, limit, allowed)
    return min(asked, allowed) if asked else allowed


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return SPARE_DESCRIPTORS
