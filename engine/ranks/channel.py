"""The pass channel: carries the leader's orders at the start, and then the batch of every pass, to all followers."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import zmq

from pilotfish.engine.execution.batch import HostBatch
from pilotfish.engine.execution.batch_layout import BatchShape
from pilotfish.engine.ranks.wire import Allocate, Measure, Meet, Order, Welcome
from pilotfish.errors import RankError

_OrderType = TypeVar("_OrderType", Meet, Measure, Allocate)

KEY_BYTES = 8
ORDER, PASS = 0, 1
_NO_BATCH = BatchShape(0, 0, 0, 0)
_HEADER = struct.Struct(f"<{KEY_BYTES}sBBxxI{len(BatchShape._fields)}I")


@dataclass(frozen=True, slots=True)
class Header:
    """The first frame of a message on the pass channel; the second is an Order, or a batch's buffer."""

    key: bytes
    kind: int
    model: int = 0
    """Number of the model: 0 for the target, then the sharded draft models."""
    number: int = 0
    """Number of the pass, counted from 1: a gap is a lost message."""
    shape: BatchShape = _NO_BATCH

    def pack(self) -> bytes:
        return _HEADER.pack(self.key, self.kind, self.model, self.number, *self.shape)

    @staticmethod
    def unpack(data: bytes) -> Header:
        key, kind, model, number, *shape = _HEADER.unpack(data)
        return Header(key, kind, model, number, BatchShape(*shape))


class PassChannel:
    """The leader's end. Messages reach the followers that have subscribed to this engine's key: `wait_for` them."""

    def __init__(self, endpoint: str) -> None:
        """Listen at `endpoint`, as for zmq's bind. Raises zmq.ZMQError if it cannot."""
        self.key = os.urandom(KEY_BYTES)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # every subscription, not only the first to a key
        self._socket.ipv6 = True
        self._socket.set_hwm(0)  # drop nothing; at most a pass or two can pile up, since the leader waits for them
        self._socket.linger = 0
        try:
            self._socket.bind(endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def endpoint(self) -> str:
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def wait_for(self, listeners: int, check: Callable[[], None]) -> None:
        """Wait for so many subscriptions; `check` is called meanwhile, and may raise."""
        while listeners:
            if self._socket.poll(200):
                listeners -= self._socket.recv() == b"\x01" + self.key
            check()

    def order(self, order: Order) -> None:
        self._socket.send_multipart([Header(self.key, ORDER).pack(), msgspec.msgpack.encode(order)])

    def broadcast(self, model: int, number: int, host: HostBatch) -> None:
        self._socket.send_multipart([Header(self.key, PASS, model, number, host.shape).pack(), host.buffer.data])

    def close(self) -> None:
        self._context.destroy(linger=0)


class PassReader:
    """A follower's end."""

    def __init__(self, welcome: Welcome) -> None:
        self._socket = zmq.Context().socket(zmq.SUB)
        self._socket.ipv6 = True
        self._socket.set_hwm(0)
        self._socket.connect(welcome.passes)
        assert len(welcome.key) == KEY_BYTES
        self._socket.subscribe(welcome.key)

    def expect(self, kind: type[_OrderType]) -> _OrderType:
        """Wait for the next message, which must be this order."""
        _, data = self._socket.recv_multipart()
        order = msgspec.msgpack.decode(data, type=Order)
        if not isinstance(order, kind):
            raise RankError(f"rank 0 sent {type(order).__name__} where {kind.__name__} was due")
        return order

    def next_pass(self, block_size: int) -> tuple[Header, HostBatch]:
        """Wait for the next message, which must be a pass."""
        first, frame = self._socket.recv_multipart(copy=False)
        header = Header.unpack(first.bytes)
        if header.kind != PASS:
            raise RankError("rank 0 sent an order where a pass was due")
        buffer = np.frombuffer(frame.buffer, dtype=np.uint8).copy()  # a frame's memory is neither aligned nor writable
        return header, HostBatch.unpack(header.shape, buffer, block_size)
