"""Publishes the prefix cache's events over ZeroMQ, as vLLM does: a PUB socket for what happens, and, if it has an
endpoint, a ROUTER socket for what a subscriber has missed.

A message has three frames: the topic, the sequence number (8 bytes, big-endian, from 0 in each engine), and an
EventBatch. A subscriber that sees a gap sends the number from which it misses messages to the ROUTER socket, in a
message of 8 bytes (REQ sockets put an empty frame before it, others must), and receives those that are still kept,
each after an empty frame; the last has the number -1 and no batch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import msgspec
import zmq

from pilotfish.engine.memory.cache_events import CacheEvent, EventBatch
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

KEPT_BATCHES = 10_000
"""Messages that are kept for replay, as in vLLM."""
KEPT_BYTES = 64 * 2**20
"""Bytes of them, at most."""
QUEUED_BATCHES = 100_000
"""Messages that a slow subscriber may have waiting; what comes after is lost to it, and must be replayed."""
LINGER_MS = 500
END = (-1).to_bytes(8, "big", signed=True)


class EventPublisher:
    """Sends batches from a thread of its own. `endpoint` and `replay_endpoint` are bound. Raises ConfigError for
    endpoints that cannot be."""

    def __init__(self, endpoint: str, replay_endpoint: str = "", topic: str = "") -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._topic = topic.encode()
        self._batches: SimpleQueue[list[CacheEvent] | None] = SimpleQueue()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._context = zmq.Context()
        # Sockets belong to one thread at a time; this pair wakes the thread that waits for batches and requests alike.
        self._wake, self._woken = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._woken.bind("inproc://batches")
        self._wake.connect("inproc://batches")
        try:
            self._published = self._bound(zmq.PUB, "kv_events_endpoint", endpoint)
            self._replay = None
            if replay_endpoint:
                self._replay = self._bound(zmq.ROUTER, "kv_events_replay_endpoint", replay_endpoint)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._thread = Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: list[CacheEvent]) -> None:
        """Send events, in order, if there are any. Takes microseconds, whatever subscribers do."""
        if events:
            self._batches.put(events)
            self._wake.send(b"")

    def close(self) -> None:
        """Send what is queued, and end. May be called again."""
        if self._thread.is_alive():
            self._batches.put(None)
            self._wake.send(b"")
            self._thread.join(2 * LINGER_MS / 1000)
        self._context.destroy(linger=LINGER_MS)

    def _bound(self, kind: int, name: str, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.sndhwm = QUEUED_BATCHES
        socket.linger = LINGER_MS
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            reason = zmq.strerror(error.errno or 0)
            raise ConfigError(
                f"{name} is {endpoint!r}, which cannot be listened on: {reason}. It must be such as tcp://*:5557 or "
                "tcp://127.0.0.1:5557"
            ) from error
        return socket

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in filter(None, (self._woken, self._replay)):
            poller.register(socket, zmq.POLLIN)
        number = 0
        while True:
            ready = dict(poller.poll())
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay)
            if self._woken not in ready:
                continue
            self._woken.recv()
            events = self._batches.get()
            if events is None:
                return
            data = self._encode(EventBatch(time.time(), events))
            self._published.send_multipart((self._topic, number.to_bytes(8, "big"), data))
            self._keep(number, data)
            number += 1

    def _keep(self, number: int, data: bytes) -> None:
        self._kept.append((number, data))
        self._kept_bytes += len(data)
        while len(self._kept) > KEPT_BATCHES or self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        """Send the kept messages from a number on to whoever asked. What is no request is ignored."""
        request: Sequence[bytes] = replay.recv_multipart()
        if len(request) != 3 or len(request[2]) != 8:
            logger.warning("a request to kv_events_replay_endpoint is not an 8-byte number, and was ignored")
            return
        client, first = request[0], int.from_bytes(request[2], "big")
        for number, data in self._kept:
            if number >= first:
                replay.send_multipart((client, b"", self._topic, number.to_bytes(8, "big"), data))
        replay.send_multipart((client, b"", b"", END, b""))
