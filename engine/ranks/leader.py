"""The leader's side of tensor parallelism: rank 0 starts the ranks of its host, meets all of them, and gives every pass
to them before it computes its own shard. `watch` watches them; what they do is in `follower`."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import zmq

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.child_process import LastWords
from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.execution.batch import HostBatch, Span, pack
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.ranks.channel import PassChannel
from pilotfish.engine.ranks.devices import assign_device
from pilotfish.engine.ranks.launch import WORKER_COMMAND, end_workers, start_worker
from pilotfish.engine.ranks.topology import Topology, bracketed, control_endpoint, listening_address, ranks_of
from pilotfish.engine.ranks.torch_group import TorchGroup, collective_seconds, connect, serve_store
from pilotfish.engine.ranks.watch import Watch
from pilotfish.engine.ranks.wire import Allocate, Joined, Loaded, Measure, Measured, Meet, Prepared, Welcome
from pilotfish.errors import CollectiveError, ConfigError

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of a divided model, as rank 0 has them: make it with `start_ranks`, and `close` it at the end."""

    def __init__(
        self,
        config: EngineConfig,
        topology: Topology,
        comm: TorchGroup,
        device: torch.device,
        watch: Watch,
        channel: PassChannel,
        local: _Local,
    ) -> None:
        self.config = config
        self.comm = comm
        self._device = device
        self._watch = watch
        self._channel = channel
        self._local = local
        self._led = 0
        self._topology = topology

    def reported(self, progress: Progress) -> Progress:
        """`progress` that tells of the slowest rank. Calling it raises RankError once the engine has failed."""

        def report(what: str, share: float) -> None:
            self.check()
            progress(what, self._watch.slowest(what, share))

        return report

    def block_count(self, block_bytes: int, free: int, progress: Progress) -> int:
        """KV blocks that fit on every rank, once all are loaded. `block_bytes`: of a block on rank 0, over all its
        caches; `free`: bytes that rank 0 could allocate."""
        self._watch.wait_for(Loaded, lambda ranks: progress(f"waiting for {ranks}", 0.0))
        self._channel.order(Measure())
        measured = [Measured(free, block_bytes), *self._watch.wait_for(Measured)]
        config = self.config
        if config.kv_cache_memory:
            return min(config.kv_cache_memory // each.block_bytes for each in measured)
        if self._device.type == "cuda":
            share = cache_share(config.kv_cache_share, on_gpu=True)
            return min(int(share * each.free) // each.block_bytes for each in measured)
        counts = []
        for first in range(0, len(measured), self._topology.local_size):  # the ranks of a host share its memory
            host = measured[first : first + self._topology.local_size]
            memory = int(cache_share(config.kv_cache_share, on_gpu=False) * min(each.free for each in host))
            counts.append(memory // sum(each.block_bytes for each in host))
        return min(counts)

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Let all ranks make their KV caches, and capture passes as rank 0 does; `wait_prepared` waits for it."""
        self._channel.order(Allocate(num_blocks, max_model_len))

    def wait_prepared(self) -> None:
        self._watch.wait_for(Prepared)

    def lead(self, runner: ModelRunner) -> LeaderRunner:
        """`runner`, whose passes all ranks compute. Divided models are led in the order in which ranks load them."""
        self._led += 1
        return LeaderRunner(runner, self._led - 1, self._channel, self._watch)

    def check(self) -> None:
        """Raise RankError if a rank has failed: what has been computed since is not to be used."""
        self._watch.check()

    def memory(self) -> tuple[RankMemory, ...]:
        """What the ranks above 0 have said last."""
        return self._watch.memory()

    def close(self, error: str = "") -> None:
        """End all ranks; `error` tells other hosts why, if not because the engine was stopped. May be called again."""
        self._watch.close(error)
        self._local.end()
        self.comm.close()
        self._channel.close()


class LeaderRunner:
    """Rank 0's runner of a divided model: as ModelRunner, and each pass goes to the other ranks first. Raises RankError
    from `run` and `run_batch` when a rank has failed."""

    def __init__(self, runner: ModelRunner, model: int, channel: PassChannel, watch: Watch) -> None:
        self._runner = runner
        self._model = model
        self._channel = channel
        self._watch = watch

    @property
    def model(self) -> DecoderModel:
        return self._runner.model

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def most_spans(self) -> int:
        return self._runner.most_spans

    def trial(self, rows: int) -> list[Span]:
        """See ModelRunner.trial."""
        return self._runner.trial(rows)

    def capture(self, name: str, plan: GraphPlan, feature_layers: tuple[int, ...] = ()) -> None:
        """See ModelRunner.capture. The other ranks do so by themselves, model by model in the order of `Ranks.lead`."""
        self._watch.begin()
        with self._together(f"while it captured passes of {name}"):
            self._runner.capture(name, plan, feature_layers)

    def run(self, spans: Sequence[Span], tap: FeatureTap | None = None) -> torch.Tensor:
        """See ModelRunner.run."""
        return self.run_batch(pack(spans, self._runner.block_size), tap)

    def run_on_device(self, spans: Sequence[Span], token_ids: torch.Tensor) -> torch.Tensor:
        """See ModelRunner.run_on_device. The other ranks need the tokens, too, so the host waits for them."""
        host = pack(spans, self._runner.block_size)
        host.arrays.token_ids[:] = token_ids.cpu().numpy()
        return self.run_batch(host)

    def run_batch(self, host: HostBatch, tap: FeatureTap | None = None) -> torch.Tensor:
        """See ModelRunner.run_batch."""
        number = self._watch.begin_pass()
        self._channel.broadcast(self._model, number, host)
        with self._together(f"in pass {number}"):
            return self._runner.run_batch(host, tap)

    @contextmanager
    def _together(self, when: str) -> Iterator[None]:
        """What all ranks do at the same time: if it fails here alone, the others are in the middle of it, for good."""
        try:
            yield
        except CollectiveError:
            raise self._watch.why() from None
        except BaseException as error:
            self._watch.fail(f"rank 0 failed {when}: {type(error).__name__} {error}".rstrip())
            raise
        self._watch.end(_end_of_work(self.device))


def _end_of_work(device: torch.device) -> Callable[[], bool]:
    """Tells whether the device has done all that it has been given up to now."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    return event.query


@dataclass(slots=True)
class _Local:
    """What rank 0 has on its own host for the others: their processes, and the folder of their sockets."""

    directory: str
    workers: list[subprocess.Popen[bytes]]

    def end(self) -> None:
        end_workers(self.workers)
        shutil.rmtree(self.directory, ignore_errors=True)


def start_ranks(
    config: EngineConfig,
    progress: Progress,
    last_words: LastWords | None = None,
    command: Sequence[str] = WORKER_COMMAND,
) -> Ranks:
    """Start the ranks of this host, wait for those of others, and meet them all. They load from then on.

    `last_words` end this process where its main thread cannot. Raises ConfigError for what this host cannot do,
    RankError for a rank that does not come.
    """
    topology = Topology.of(config, 0)
    own_config, device = assign_device(config, topology)
    master = config.master_addr if config.nnodes > 1 else None
    interface = listening_address(master) if master is not None else ""
    store = serve_store(master or "127.0.0.1", topology.size)
    local = _Local(tempfile.mkdtemp(prefix="pilotfish-"), [])
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
        channel.wait_for(topology.size - 1, watch.check)
        channel.order(Meet())
        try:
            timeout = collective_seconds(config.rank_timeout)
            comm.append(connect(store, 0, topology.size, device, welcome.store_host, timeout))
        except CollectiveError:
            raise watch.why() from None
        watch.counts(lambda: comm[0].entered)
        logger.info("%d ranks on %d host(s), %s", topology.size, topology.nnodes, comm[0].name)
        return Ranks(own_config, topology, comm[0], device, watch, channel, local)
    except BaseException as error:
        if watch is not None:
            watch.close(str(error) or type(error).__name__)
        local.end()
        if channel is not None:
            channel.close()
        raise
