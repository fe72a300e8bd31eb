"""Rank 0's side of tensor parallelism: it starts the ranks of its host, meets all of them, and gives every pass to them
before it computes its own part. Who watches them is `engine.ranks.watch`; what the others do is `follower`.
"""

from __future__ import annotations

import logging
import shutil
import socket as sockets
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import torch
import zmq

from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.execution.batch import HostBatch, Span, pack
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.loader import Progress, thread_count
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.models.model import Model
from pilotfish.engine.ranks.channel import PassChannel
from pilotfish.engine.ranks.control_messages import (
    Allocate,
    Joined,
    Loaded,
    Measure,
    Measured,
    Meet,
    Place,
    Prepared,
    Welcome,
    addresses_of,
    bracketed,
    control_endpoint,
    ranks_of,
)
from pilotfish.engine.ranks.torch_group import TorchGroup, connect, serve_store
from pilotfish.engine.ranks.watch import LastWords, Watch
from pilotfish.engine.ranks.worker import WORKER_COMMAND, end_workers, start_worker
from pilotfish.engine.request import RankMemory
from pilotfish.errors import CollectiveError, ConfigError

logger = logging.getLogger(__name__)


def settle(config: EngineConfig, place: Place) -> tuple[EngineConfig, torch.device]:
    """Where a rank computes: on its host's GPU of its number, or on its share of the cores. Returns the settings with
    this rank's threads, and the device. Raises ConfigError for a host with fewer GPUs than ranks."""
    if config.device != "cpu" and torch.cuda.is_available():
        there = torch.cuda.device_count()
        if there < place.local_size:
            raise ConfigError(
                f"tensor_parallel_size is {place.size} on {place.nnodes} host(s), which takes {place.local_size} GPUs "
                f"of each, but torch sees {there} on {sockets.gethostname()}"
            )
        torch.cuda.set_device(place.local_rank)
        return config, torch.device("cuda", place.local_rank)
    threads = config.num_threads or max(1, thread_count(config) // place.local_size)
    return msgspec.structs.replace(config, num_threads=threads), torch.device("cpu")


class Ranks:
    """The ranks of a divided model, as rank 0 has them: make it with `start_ranks`, and `close` it at the end."""

    def __init__(
        self,
        config: EngineConfig,
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
        self._memory: dict[int, RankMemory] = {}
        self._place = Place(0, config.tensor_parallel_size, config.nnodes)

    def reported(self, progress: Progress) -> Progress:
        """`progress` that tells of the slowest rank. Calling it raises RankError once the engine has failed."""

        def report(what: str, share: float) -> None:
            self.check()
            progress(what, self._watch.slowest(what, share))

        return report

    def block_count(self, block_bytes: int, free: int, progress: Progress) -> int:
        """KV blocks that fit on every rank, once all are loaded. `block_bytes`: of a block on rank 0, over all its
        caches; `free`: bytes that rank 0 could allocate."""
        self._watch.wait_for(Loaded, lambda: progress(f"waiting for {self._watch.waited_for(Loaded)}", 0.0))
        self._channel.order(Measure())
        measured = [Measured(free, block_bytes), *self._watch.wait_for(Measured)]
        config = self.config
        if config.kv_cache_memory:
            return min(config.kv_cache_memory // each.block_bytes for each in measured)
        if self._device.type == "cuda":
            share = cache_share(config.kv_cache_share, on_gpu=True)
            return min(int(share * each.free) // each.block_bytes for each in measured)
        counts = []
        for first in range(0, len(measured), self._place.local_size):  # the ranks of a host share its memory
            host = measured[first : first + self._place.local_size]
            memory = int(cache_share(config.kv_cache_share, on_gpu=False) * min(each.free for each in host))
            counts.append(memory // sum(each.block_bytes for each in host))
        return min(counts)

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Let all ranks make their KV caches, and capture passes as rank 0 does; `wait_prepared` waits for it."""
        self._channel.order(Allocate(num_blocks, max_model_len))

    def wait_prepared(self) -> None:
        self._memory = {each.memory.rank: each.memory for each in self._watch.wait_for(Prepared)}

    def lead(self, runner: ModelRunner) -> LeadRunner:
        """`runner`, whose passes all ranks compute. Divided models are led in the order in which ranks load them."""
        self._led += 1
        return LeadRunner(runner, self._led - 1, self._channel, self._watch)

    def check(self) -> None:
        """Raise RankError if a rank has failed: what has been computed since is not to be used."""
        self._watch.check()

    def memory(self) -> tuple[RankMemory, ...]:
        """Of the ranks above 0, as they have said last."""
        self._memory |= {memory.rank: memory for memory in self._watch.memory()}
        return tuple(self._memory[rank] for rank in sorted(self._memory))

    def close(self, error: str = "") -> None:
        """End all ranks; `error` tells other hosts why, if not because the engine was stopped. May be called again."""
        self._watch.close(error)
        self._local.end()
        self.comm.close()
        self._channel.close()


class LeadRunner:
    """Rank 0's runner of a divided model: as ModelRunner, and each pass goes to the other ranks first. Raises RankError
    from `run` and `run_batch` when a rank has failed."""

    def __init__(self, runner: ModelRunner, model: int, channel: PassChannel, watch: Watch) -> None:
        self._runner = runner
        self._model = model
        self._channel = channel
        self._watch = watch

    @property
    def model(self) -> Model:
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


def collective_seconds(config: EngineConfig) -> float:
    """How long a collective on the CPU may wait for the others: so long that the watch, who knows more, comes first."""
    return max(30.0, 2 * config.rank_timeout)


def _interface(master: str) -> str:
    """What to listen on to be reached at `master`: that address where it is one of this machine's, else all of them, as
    where it is the name of a service in front of it."""
    for address in addresses_of(master):
        family = sockets.AF_INET6 if ":" in address else sockets.AF_INET
        try:
            with sockets.create_server((address, 0), family=family):
                return bracketed(address)
        except OSError:
            continue
    return "*"


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
    place = Place(0, config.tensor_parallel_size, config.nnodes)
    settled, device = settle(config, place)
    master = config.master_addr if config.nnodes > 1 else None
    interface = _interface(master) if master is not None else ""
    store = serve_store(master or "127.0.0.1", place.size)
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
        joined = watch.wait_for(Joined, lambda: progress(f"waiting for {watch.waited_for(Joined)}", 0.0))
        for rank, each in enumerate(joined, start=1):
            if each.device != device.type:
                raise ConfigError(f"rank {rank} computes on {each.device}, rank 0 on {device.type}: set device")
        channel.wait_for(place.size - 1, watch.check)
        channel.order(Meet())
        try:
            comm.append(connect(store, 0, place.size, device, welcome.store_host, collective_seconds(config)))
        except CollectiveError:
            raise watch.why() from None
        watch.counts(lambda: comm[0].entered)
        logger.info("%d ranks on %d host(s), %s", place.size, place.nnodes, comm[0].name)
        return Ranks(settled, comm[0], device, watch, channel, local)
    except BaseException as error:
        if watch is not None:
            watch.close(str(error) or type(error).__name__)
        local.end()
        if channel is not None:
            channel.close()
        raise
