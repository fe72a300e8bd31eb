"""The leader's side of tensor parallelism: rank 0 starts the ranks of its host, connects to all ranks, and sends every
pass to them before it computes its own shard. `watch` watches them; `follower` is their side."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import zmq

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.child_process import LastWords
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import HostBatch
from pilotfish.engine.memory.kv_cache import CacheRoom
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.ranks.channel import PassChannel
from pilotfish.engine.ranks.devices import assign_device
from pilotfish.engine.ranks.launch import WORKER_COMMAND, end_workers, start_worker
from pilotfish.engine.ranks.topology import bracketed, control_endpoint, listening_address, ranks_of, ranks_per_host
from pilotfish.engine.ranks.torch_group import TorchGroup, collective_seconds, connect, serve_store
from pilotfish.engine.ranks.watch import Watch
from pilotfish.engine.ranks.wire import Allocate, Joined, Loaded, Measure, Measured, Meet, Prepared, Welcome
from pilotfish.errors import CollectiveError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Local:
    """The leader's resources on its host: the workers' processes, and the folder of the sockets."""

    directory: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="pilotfish-"))
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def end(self) -> None:
        end_workers(self.workers)
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(slots=True)
class Ranks:
    """The leader's handle on the other ranks: made by `start_ranks`; `close` it at the end."""

    config: EngineConfig
    """The engine's settings, with rank 0's threads."""
    comm: TorchGroup
    _device: torch.device
    _watch: Watch
    _channel: PassChannel
    _local: _Local

    def reported(self, progress: Progress) -> Progress:
        """`progress` of the slowest rank. Calling it raises RankError once the engine has failed."""

        def report(what: str, share: float) -> None:
            self.check()
            progress(what, self._watch.slowest(what, share))

        return report

    @property
    def sharing(self) -> int:
        """The number of consecutive ranks that share a memory: on the CPU those of a host."""
        return 1 if self._device.type == "cuda" else ranks_per_host(self.config)

    def rooms(self, config: EngineConfig, own: Callable[[], CacheRoom], progress: Progress) -> list[CacheRoom]:
        """Wait until all ranks have loaded; return the room of each. `own` measures rank 0's, at the same time as the
        others do; `config` has its limits of steps."""
        self._watch.wait_for(Loaded, lambda ranks: progress(f"waiting for {ranks}", 0.0))
        self._channel.order(Measure(config.max_num_seqs, config.max_batch_tokens))
        return [own(), *(CacheRoom(each.free, each.block_bytes) for each in self._watch.wait_for(Measured))]

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Order all ranks to allocate their KV caches and capture passes; `wait_prepared` waits for it."""
        self._channel.order(Allocate(num_blocks, max_model_len))

    def wait_prepared(self) -> None:
        self._watch.wait_for(Prepared)

    def lead(self, model: int) -> ModelLead:
        """The lead of the sharded model of this number, as `Assembly` counts them."""
        return ModelLead(model, self._device, self._channel, self._watch)

    def check(self) -> None:
        """Raise RankError if a rank has failed: results since then must not be used."""
        self._watch.check()

    def memory(self) -> tuple[RankMemory, ...]:
        """The last readings of the ranks above 0."""
        return self._watch.memory()

    def close(self, error: str = "") -> None:
        """End all ranks; `error` tells other hosts why, if not because the engine was stopped. May be called again."""
        self._watch.close(error)
        self._local.end()
        self.comm.close()
        self._channel.close()


@dataclass(frozen=True, slots=True)
class ModelLead:
    """Rank 0's Lead of a sharded model: sends each pass to the other ranks first."""

    model: int
    device: torch.device
    channel: PassChannel
    watch: Watch

    def capturing(self, name: str) -> AbstractContextManager[None]:
        """See Lead. The other ranks capture by themselves, model by model."""
        self.watch.begin()
        return self._together(f"while it captured passes of {name}")

    def computing(self, host: HostBatch) -> AbstractContextManager[None]:
        """See Lead."""
        number = self.watch.begin_pass()
        self.channel.broadcast(self.model, number, host)
        return self._together(f"in pass {number}")

    @contextmanager
    def _together(self, when: str) -> Iterator[None]:
        """Guards work that all ranks do together: if it fails here, the engine ends, since the others would hang."""
        try:
            yield
        except CollectiveError:
            raise self.watch.why() from None
        except BaseException as error:
            self.watch.fail(f"rank 0 failed {when}: {type(error).__name__} {error}".rstrip())
            raise
        self.watch.end(_end_of_work(self.device))


def _end_of_work(device: torch.device) -> Callable[[], bool]:
    """Returns what tells whether the device has done all that is queued there now."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    return event.query


def start_ranks(
    config: EngineConfig,
    progress: Progress,
    last_words: LastWords | None = None,
    command: Sequence[str] = WORKER_COMMAND,
) -> Ranks:
    """Start the ranks of this host, wait for those of others, and connect to all. They load from then on.

    `last_words` ends this process if its main thread is stuck. Raises ConfigError for what this host cannot do,
    RankError for a rank that does not join.
    """
    size = config.tensor_parallel_size
    own_config, device = assign_device(config, 0)
    master = config.master_addr if config.nnodes > 1 else None
    interface = listening_address(master) if master is not None else ""
    store = serve_store(master or "127.0.0.1", size)
    local = _Local()
    comm: list[TorchGroup] = []
    channel = watch = None
    try:
        channel = PassChannel(f"ipc://{local.directory}/passes" if master is None else f"tcp://{interface}:*")
        port = channel.endpoint.rpartition(":")[2]
        welcome = Welcome(
            key=channel.key,
            passes=channel.endpoint if master is None else f"tcp://{bracketed(master)}:{port}",
            store_host=master or "127.0.0.1",
            store_port=store.port,
        )
        endpoint = f"ipc://{local.directory}/control" if master is None else control_endpoint(config)
        bind = endpoint if master is None else f"tcp://{interface}:{config.master_port}"

        def abort() -> None:
            for each in comm:
                each.abort()

        def end_process(reason: str) -> None:
            assert last_words is not None
            shutil.rmtree(local.directory, ignore_errors=True)
            last_words(reason)

        try:
            watch = Watch(config, bind, welcome, abort, end_process if last_words is not None else None)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on master_port {config.master_port} of {master}: {error}") from error
        for rank in ranks_of(config)[1:]:
            local.workers.append(start_worker(config, rank, endpoint, local.directory, command))
            watch.adopt(rank, local.workers[-1])
        joined = watch.wait_for(Joined, lambda ranks: progress(f"waiting for {ranks}", 0.0))
        for rank, each in enumerate(joined, start=1):
            if each.device != device.type:
                raise ConfigError(f"rank {rank} computes on {each.device}, rank 0 on {device.type}: set device")
        channel.wait_for(size - 1, watch.check)
        channel.order(Meet())
        timeout = collective_seconds(config.rank_timeout)
        try:
            comm.append(connect(store, 0, size, device, welcome.store_host, timeout))
        except CollectiveError:
            raise watch.why() from None
        watch.counts(lambda: comm[0].entered)
        logger.info("%d ranks on %d host(s), %s", size, config.nnodes, comm[0].name)
        return Ranks(own_config, comm[0], device, watch, channel, local)
    except BaseException as error:
        if watch is not None:
            watch.close(str(error) or type(error).__name__)
        local.end()
        if channel is not None:
            channel.close()
        raise
