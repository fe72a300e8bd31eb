"""What a rank above 0 does: it loads its part of the divided models, then computes every pass that rank 0 gives out. It
has no sequences: what a pass needs to know of them is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import HostBatch
from pilotfish.engine.execution.buckets import DRAFT_LENGTHS, span_lengths
from pilotfish.engine.execution.graphs import graph_backend, graph_memory, graph_plan
from pilotfish.engine.execution.loader import Platform, load_model
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.memory.usage import MemoryMeter
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.ranks.channel import PassReader
from pilotfish.engine.ranks.devices import assign_device
from pilotfish.engine.ranks.launch import WorkerTask
from pilotfish.engine.ranks.link import Link
from pilotfish.engine.ranks.topology import Topology
from pilotfish.engine.ranks.torch_group import TorchGroup, collective_seconds, connect, join_store
from pilotfish.engine.ranks.wire import (
    Allocate,
    Beat,
    Header,
    Joined,
    Loaded,
    Measure,
    Measured,
    Meet,
    Prepared,
    RankLoading,
    Welcome,
)
from pilotfish.engine.speculation.drafters.registry import find
from pilotfish.errors import RankError


class Runner(Protocol):
    """What is needed of a ModelRunner."""

    def run_batch(self, host: HostBatch) -> object: ...


class Part(Protocol):
    """This rank's part of the divided models."""

    block_size: int
    block_bytes: int
    """Of one block of all KV caches here."""

    def free(self) -> int:
        """Bytes that there are for caches."""
        ...

    def allocate(self, num_blocks: int, max_model_len: int) -> list[Runner]:
        """Make the caches, and capture passes; a runner for each model, the target's first."""
        ...


Load = Callable[[EngineConfig, Communicator, Progress], Part]


class DividedModels:
    """The target, and the draft models if they are divided, too. Raises what `load_model` does."""

    def __init__(self, config: EngineConfig, comm: Communicator, progress: Progress) -> None:
        target, platform, files = load_model(config.model, None, config, config.max_model_len, progress, comm)
        self._platform: Platform = platform
        self._models: list[DecoderModel] = [target]
        if config.draft_tensor_parallel_size > 1:
            for source in find(config.drafter, files.name):
                if source.files is not None and source.kind.sharded:
                    positions = target.config.max_position
                    draft, _, _ = load_model(str(source.files.path), platform, config, positions, progress, comm)
                    self._models.append(draft)
        self._config = config
        self._make_graphs = graph_backend(config.enforce_eager, platform.attention, platform.device)
        self._graph_memory = 0
        self.block_size = platform.block_size
        self.block_bytes = sum(
            kv_cache.block_bytes(model.config, self.block_size, platform.cache_dtype, comm.size)
            for model in self._models
        )

    def free(self) -> int:
        free = free_memory(self._platform.device)
        self._graph_memory = graph_memory(self._config, free) if self._make_graphs else 0
        return free - self._graph_memory

    def allocate(self, num_blocks: int, max_model_len: int) -> list[Runner]:
        platform, config = self._platform, self._config
        padding = 1 if self._make_graphs else 0
        runners = []
        for model in self._models:
            caches = kv_cache.allocate(
                model.config,
                platform.attention,
                num_blocks + padding,
                self.block_size,
                platform.cache_dtype,
                platform.device,
                model.comm.size,
            )
            runners.append(ModelRunner(model, caches, self.block_size, platform.device))
        if self._make_graphs:
            backend = self._make_graphs()
            for place, runner in enumerate(runners):
                lengths = DRAFT_LENGTHS if place else span_lengths(config.num_draft_tokens)
                plan = graph_plan(config, backend, max_model_len, num_blocks, self._graph_memory, lengths)
                runner.capture(f"divided model {place}", plan)
        return list(runners)


def follow(task: WorkerTask, welcome: Welcome, link: Link, load: Load = DividedModels) -> None:
    """Take part, for as long as this process lives. Raises what stands in the way."""
    topology = Topology.of(task.config, task.rank)
    config, device = assign_device(task.config, topology)
    orders = PassReader(welcome)
    link.send(Joined(device.type))
    orders.expect(Meet)
    timeout = collective_seconds(config.rank_timeout)
    store = join_store(welcome.store_host, welcome.store_port, topology.size, timeout)
    comm = connect(store, task.rank, topology.size, device, welcome.store_host, timeout)
    memory = MemoryMeter(str(device), task.rank)
    following = _Following(comm, memory)
    link.beat = following.beat
    part = load(config, comm, lambda what, share: link.send(RankLoading(what, share)))
    link.send(Loaded())
    orders.expect(Measure)
    link.send(Measured(part.free(), part.block_bytes))
    order = orders.expect(Allocate)
    following.runners = part.allocate(order.num_blocks, order.max_model_len)
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
