"""The parent process of the ranks of a host other than node 0; it ends with the engine. No torch, no model, no HTTP.

Its ranks talk to the leader themselves. This process starts them, tells the leader when one of them has ended, which
the leader cannot see from its own host, and learns from the leader when the engine ends.
"""

from __future__ import annotations

import logging
import queue
import signal
import subprocess
import time
from collections.abc import Sequence

from pilotfish.engine.child_process import how_it_ended
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.ranks.launch import WORKER_COMMAND, end_workers, start_worker
from pilotfish.engine.ranks.link import Link
from pilotfish.engine.ranks.topology import addresses_of, control_endpoint, ranks_of
from pilotfish.engine.ranks.wire import Died

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
REASON_SECONDS = 5.0
"""How long the leader has to say why the engine ends, once a rank of this host has ended."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


_Events = queue.SimpleQueue[str | signal.Signals]
"""Why the engine ends, or "" if it was stopped; or a signal to this process."""


def run_node(config: EngineConfig, command: Sequence[str] = WORKER_COMMAND) -> int:
    """Run this host's ranks until the engine ends; return the exit status: 0 if it was stopped, 1 if it failed, 128
    plus the number of a signal to this process. Raises ConfigError for a master_addr that does not resolve.

    The model's files must be here already: the ranks would all download them at once.
    """
    addresses_of(config.master_addr or "")  # fail here if there are none
    endpoint, ranks = control_endpoint(config), ranks_of(config)
    events: _Events = queue.SimpleQueue()
    handlers = {
        number: signal.signal(number, lambda number, _: events.put(signal.Signals(number))) for number in SIGNALS
    }
    link = Link(config, -1, endpoint, events.put)
    workers = {rank: start_worker(config, rank, endpoint, None, command) for rank in ranks}
    name = f"node {config.node_rank} (ranks {', '.join(map(str, ranks))})"
    logger.info("%s: meeting node 0 at %s", name, endpoint.removeprefix("tcp://"))
    try:
        return _hold(name, workers, link, events)
    finally:
        end_workers(list(workers.values()))
        link.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _hold(name: str, workers: dict[int, subprocess.Popen[bytes]], link: Link, events: _Events) -> int:
    """Wait for the end of the engine; return the exit status."""
    died: str | None = None
    deadline = 0.0
    while True:
        try:
            event = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            event = None
        if isinstance(event, signal.Signals):
            logger.info("%s: told to end by %s, and the engine with it", name, event.name)
            link.send(Died(min(workers), -event))
            return 128 + event
        if event is not None:
            if event:
                logger.error("%s ends with the engine: %s", name, event)
                return 1
            logger.info("%s: the engine was stopped, and its ranks here have ended", name)
            return 0
        if died is None:
            for rank, worker in workers.items():
                if (code := worker.poll()) is not None:
                    died, deadline = f"rank {rank} {how_it_ended(code)}", time.monotonic() + REASON_SECONDS
                    link.send(Died(rank, code))
                    break
        elif time.monotonic() > deadline:
            logger.error("%s ends: %s", name, died)
            return 1
