"""The work of a rank above 0: it loads its shards of the models, then computes every pass that the leader sends. It has
no sequences: everything that a pass needs of them is in its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.assembly import Assembly
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import HostBatch
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.usage import MemoryMeter
from pilotfish.engine.ranks.channel import Header, PassReader
from pilotfish.engine.ranks.devices import assign_device
from pilotfish.engine.ranks.launch import WorkerTask
from pilotfish.engine.ranks.link import Link
from pilotfish.engine.ranks.torch_group import TorchGroup, collective_seconds, connect, join_store
from pilotfish.engine.ranks.wire import (
    Allocate,
    Beat,
    Joined,
    Loaded,
    Measure,
    Measured,
    Meet,
    Prepared,
    RankLoading,
    Welcome,
)
from pilotfish.errors import RankError

Assemble = Callable[[EngineConfig, Communicator, Progress], Assembly]


def follow(task: WorkerTask, welcome: Welcome, link: Link, assemble: Assemble = Assembly) -> None:
    """Compute passes until this process ends. Raises whatever prevents it."""
    config, device = assign_device(task.config, task.rank)
    size = config.tensor_parallel_size
    orders = PassReader(welcome)
    link.send(Joined(device.type))
    orders.expect(Meet)
    timeout = collective_seconds(config.rank_timeout)
    store = join_store(welcome.store_host, welcome.store_port, size, timeout)
    comm = connect(store, task.rank, size, device, welcome.store_host, timeout)
    passes = _Passes(comm, MemoryMeter(str(device), task.rank))
    link.beat = passes.beat
    assembly = assemble(config, comm, lambda what, share: link.send(RankLoading(what, share)))
    link.send(Loaded())
    limits = orders.expect(Measure)
    assembly.limit_steps(limits.max_num_seqs, limits.max_batch_tokens)
    link.send(Measured(*assembly.room()))
    order = orders.expect(Allocate)
    assembly.allocate(order.num_blocks)
    assembly.capture(order.max_model_len)
    link.send(Prepared(passes.memory.read()))
    while True:
        passes.run(assembly, *orders.next_pass(assembly.config.block_size))


class _Passes:
    """Computes a follower's passes, and counts them for its beats."""

    def __init__(self, comm: TorchGroup, memory: MemoryMeter) -> None:
        self.memory = memory
        self._comm = comm
        self._begun = 0

    def beat(self) -> Beat:
        """The next beat; called in the link's thread."""
        read = self.memory.read_if_due()
        return Beat(self._begun, self._comm.entered, read[0] if read else None)

    @torch.inference_mode()
    def run(self, assembly: Assembly, header: Header, host: HostBatch) -> None:
        self._begun += 1
        if header.number != self._begun:
            raise RankError(f"pass {header.number} came after pass {self._begun - 1}: those between were lost")
        assembly.sharded[header.model].run_batch(host)
