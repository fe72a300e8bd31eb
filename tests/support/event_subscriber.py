"""A subscriber of KV events, as a router has one."""

from __future__ import annotations

import zmq

from pilotfish.engine.memory.cache_events import AllBlocksCleared
from pilotfish.engine.memory.event_publisher import EventPublisher

WAIT_MS = 5000


class Subscriber:
    """What a router does: it subscribes, and asks for what it has missed."""

    def __init__(self, endpoint: str, replay: str, topic: str = "") -> None:
        self._context = zmq.Context()
        self.events = self._context.socket(zmq.SUB)
        self.events.subscribe(topic)
        self.events.connect(endpoint)
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(replay)

    def receive(self) -> tuple[bytes, int, bytes]:
        assert self.events.poll(WAIT_MS)
        topic, number, data = self.events.recv_multipart()
        return topic, int.from_bytes(number), data

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """The messages from `first` on."""
        self._replay.send_multipart([b"", first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while True:
            assert self._replay.poll(WAIT_MS)
            empty, _topic, number, data = self._replay.recv_multipart()
            assert empty == b""
            if int.from_bytes(number, signed=True) == -1:
                assert data == b""
                return found
            found.append((int.from_bytes(number), data))

    def ask(self, *frames: bytes) -> None:
        self._replay.send_multipart(frames)

    def wait_connected(self, publisher: EventPublisher) -> None:
        """Publish until something arrives: a PUB socket drops what it sends before."""
        while not self.events.poll(20):
            publisher.publish([AllBlocksCleared()])

    def close(self) -> None:
        self._context.destroy(linger=0)
