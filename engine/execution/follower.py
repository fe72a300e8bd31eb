"""What a rank above 0 does: it loads its part of the divided models, then computes every pass that rank 0 gives out. It
has no sequences: what a pass needs to know of them is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import torch
import zmq

from engine.config import EngineConfig
from engine.errors import RankError
from engine.execution.group import collective_seconds, settle
from engine.execution.loader import Platform, Progress, load_model
from engine.execution.runner import ModelRunner
from engine.execution.spans import BatchShape, HostBatch
from engine.execution.worker import State, WorkerLaunch
from engine.memory import kv_cache
from engine.memory.free import free_memory
from engine.memory.usage import MemoryMeter
from engine.models.interface import Model
from engine.parallel.interface import Communicator
from engine.parallel.link import Link
from engine.parallel.messages import (
    KEY_BYTES,
    PASS,
    Allocate,
    Beat,
    Header,
    Joined,
    Loaded,
    Measure,
    Measured,
    Meet,
    Order,
    Place,
    Prepared,
    RankLoading,
    Welcome,
)
from engine.parallel.torch_group import TorchGroup, connect, join_store
from engine.speculation.portfolio import kind_of
from engine.speculation.sources import find


class Runner(Protocol):
    """What is needed of a ModelRunner."""

    def run_batch(self, host: HostBatch) -> object: ...


class Part(Protocol):
    """This rank's part of the divided models."""

    block_size: int
    block_bytes: int
    """Of one block of all KV caches here."""

    def allocate(self, num_blocks: int) -> list[Runner]:
        """Make the caches; a runner for each model, the target's first."""
        ...


_OrderType = TypeVar("_OrderType", Meet, Measure, Allocate)
Load = Callable[[EngineConfig, Communicator, Progress], Part]


class DividedModels:
    """The target, and the draft models if they are divided, too. Raises what `load_model` does."""

    def __init__(self, config: EngineConfig, comm: Communicator, progress: Progress) -> None:
        target, platform, files = load_model(config.model, None, config, config.max_model_len, progress, comm)
        self._platform: Platform = platform
        self._models: list[Model] = [target]
        if config.draft_tensor_parallel_size > 1:
            for source in find(config.drafter, files.name):
                if source.files is not None and kind_of(source.files) == "draft-model":
                    positions = target.config.max_position
                    draft, _, _ = load_model(str(source.files.path), platform, config, positions, progress, comm)
                    self._models.append(draft)
        self._ranks = comm.size
        self.block_size = platform.block_size
        self.block_bytes = sum(
            kv_cache.block_bytes(model.config, self.block_size, platform.cache_dtype, self._ranks)
            for model in self._models
        )

    def allocate(self, num_blocks: int) -> list[Runner]:
        platform = self._platform
        return [
            ModelRunner(
                model,
                kv_cache.allocate(
                    model.config,
                    platform.attention,
                    num_blocks,
                    self.block_size,
                    platform.cache_dtype,
                    platform.device,
                    self._ranks,
                ),
                self.block_size,
                platform.device,
            )
            for model in self._models
        ]


def serve(launch: WorkerLaunch, welcome: Welcome, link: Link, state: State, load: Load = DividedModels) -> None:
    """Take part, for as long as this process lives. Raises what stands in the way."""
    place = Place(launch.rank, launch.config.tensor_parallel_size, launch.config.nnodes)
    config, device = settle(launch.config, place)
    orders = _Orders(welcome)
    link.send(Joined(device.type))
    orders.expect(Meet)
    store = join_store(welcome.store_host, welcome.store_port, place.size, collective_seconds(config))
    comm = connect(store, place.rank, place.size, device, welcome.store_host, collective_seconds(config))
    memory = MemoryMeter(str(device), place.rank)
    following = _Following(comm, memory)
    state.beat = following.beat
    part = load(config, comm, lambda what, share: link.send(RankLoading(what, share)))
    link.send(Loaded())
    orders.expect(Measure)
    link.send(Measured(free_memory(device), part.block_bytes))
    following.runners = part.allocate(orders.expect(Allocate).num_blocks)
    link.send(Prepared(memory.read()))
    while True:
        following.run(*orders.next_pass(part.block_size))


class _Following:
    """The passes, and how far they have come."""

    def __init__(self, comm: TorchGroup, memory: MemoryMeter) -> None:
        self.runners: list[Runner] = []
        self._comm = comm
        self._memory = memory
        self._passes = 0

    def beat(self) -> Beat:
        """Called by another thread."""
        read = self._memory.read_if_due()
        return Beat(self._passes, self._comm.entered, read[0] if read else None)

    @torch.inference_mode()
    def run(self, header: Header, host: HostBatch) -> None:
        self._passes += 1
        if header.number != self._passes:
            raise RankError(f"pass {header.number} came after pass {self._passes - 1}: those between were lost")
        self.runners[header.model].run_batch(host)


class _Orders:
    """This rank's end of the pass channel."""

    def __init__(self, welcome: Welcome) -> None:
        self._decode = msgspec.msgpack.Decoder(Order).decode
        self._socket = zmq.Context().socket(zmq.SUB)
        self._socket.ipv6 = True
        self._socket.set_hwm(0)
        self._socket.connect(welcome.passes)
        assert len(welcome.key) == KEY_BYTES
        self._socket.subscribe(welcome.key)

    def expect(self, kind: type[_OrderType]) -> _OrderType:
        """Wait for the next message, which must be this order."""
        _, data = self._socket.recv_multipart()
        order = self._decode(data)
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
        shape = BatchShape(header.spans, header.rows, header.wanted, header.max_blocks)
        return header, HostBatch.unpack(shape, buffer, block_size)
