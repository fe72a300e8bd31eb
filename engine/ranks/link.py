"""Link: the end of the control channel in a worker, or in the parent of another host's workers. A thread of its own
sends beats and receives the leader's, even while the main thread is blocked. No torch."""

from __future__ import annotations

import logging
import os
import queue
import socket as sockets
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from pilotfish.engine.child_process import PatientClock, heartbeat_seconds
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.ranks.wire import Beat, End, FromLeader, Hello, RankFailed, ToLeader, Welcome
from pilotfish.errors import RankError

logger = logging.getLogger(__name__)

POLL_MS = 50
JOIN_SECONDS = 600.0
"""How long the ranks and hosts of an engine wait for one another at the start."""
LINGER_MS = 1000


class Link:
    """The connection to the leader, from when it is made until `close`.

    `on_end` is called in the link's thread when the leader says that the engine ends (with the reason; "" if it was
    stopped), or when the leader has been silent for too long.
    """

    def __init__(self, config: EngineConfig, rank: int, endpoint: str, on_end: Callable[[str], None]) -> None:
        self.beat: Callable[[], Beat] = Beat
        """Makes the next beat; called in the link's thread."""
        self._config = config
        self._endpoint = endpoint
        self._on_end = on_end
        self._outbox: queue.SimpleQueue[ToLeader] = queue.SimpleQueue()
        self._welcome: queue.SimpleQueue[Welcome] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._outbox.put(Hello(rank, sockets.gethostname(), os.getpid(), config))
        self._thread = threading.Thread(target=self._run, name="rank-link", daemon=True)
        self._thread.start()

    def wait_welcome(self) -> Welcome:
        """Wait for the leader to admit this process. Raises RankError if it does not within JOIN_SECONDS."""
        began = time.monotonic()
        while time.monotonic() - began < JOIN_SECONDS:
            try:
                return self._welcome.get(timeout=30)
            except queue.Empty:
                logger.info("waiting for rank 0 at %s", self._endpoint)
        raise RankError(f"rank 0 could not be found at {self._endpoint} within {JOIN_SECONDS:.0f} s")

    def send(self, message: ToLeader) -> None:
        self._outbox.put(message)

    def fail(self, error: str, consequence: bool = False) -> None:
        """Tell the leader why this process ends, and close."""
        self.send(RankFailed(error, consequence))
        self.close()

    def close(self) -> None:
        """Send the messages that are left, and stop."""
        self._closing.set()
        self._thread.join(2 + LINGER_MS / 1000)

    def _run(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        decode = msgspec.msgpack.Decoder(FromLeader).decode
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = LINGER_MS
            socket.ipv6 = True
            socket.set_hwm(0)
            socket.connect(self._endpoint)
            timeout, clock = self._config.rank_timeout, PatientClock()
            interval = heartbeat_seconds(timeout)
            heard, due = None, 0.0
            while True:
                closing = self._closing.is_set()
                while not self._outbox.empty():
                    socket.send(encode(self._outbox.get()))
                if closing:
                    return
                now = clock.now()
                if heard is not None and now >= due:
                    socket.send(encode(self.beat()))
                    due = now + interval
                if heard is not None and now - heard > timeout:
                    self._on_end(f"rank 0 was silent for {now - heard:.0f} s")
                    return
                while socket.poll(0 if closing else POLL_MS):
                    heard = clock.now()
                    message = decode(socket.recv())
                    if isinstance(message, Welcome):
                        self._welcome.put(message)
                    elif isinstance(message, End):
                        self._on_end(message.error)
                        return
