"""What crosses between the ranks' processes, beside the tensors: msgspec structs in MessagePack for starting, watching
and ending; a fixed header and a packed batch for a pass.

Two channels, both pyzmq. *Control*: a ROUTER of rank 0's and a DEALER of everyone else's, owned by a thread on both
sides (`watch`, `link`), so that it speaks while a pass runs or hangs. *Passes*: from rank 0 to all others, in order.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch_layout import BatchShape
from pilotfish.engine.request import RankMemory
from pilotfish.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is among all. Hosts have the same number of ranks each, in order."""

    rank: int
    size: int
    nnodes: int = 1

    @property
    def local_size(self) -> int:
        """Ranks of a host."""
        return self.size // self.nnodes

    @property
    def local_rank(self) -> int:
        """On its host; also the number of its GPU there."""
        return self.rank % self.local_size

    @property
    def node(self) -> int:
        return self.rank // self.local_size


def ranks_of(config: EngineConfig) -> range:
    """The ranks of this host."""
    local = config.tensor_parallel_size // config.nnodes
    return range(config.node_rank * local, (config.node_rank + 1) * local)


def control_endpoint(config: EngineConfig) -> str:
    """Where several hosts find rank 0's end of the control channel."""
    return f"tcp://{bracketed(config.master_addr or '')}:{config.master_port}"


def addresses_of(master: str) -> list[str]:
    """IP addresses of node 0. Raises ConfigError where it has none."""
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"master_addr is {master!r}, which has no address here: {error}") from error
    return [str(address[0]) for *_, address in found]


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


# Control, to rank 0.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A rank's process is there, or (rank -1) one that holds the ranks of another host."""

    rank: int
    host: str
    pid: int
    config: EngineConfig


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """It hears what comes with the passes. `device`: of which kind it computes on."""

    device: str


class RankLoading(msgspec.Struct, frozen=True, tag="loading"):
    """How far its loading is: see `engine.process.messages.Loading`."""

    what: str
    share: float


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Its weights are there."""


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    free: int
    """Bytes that it could allocate now."""
    block_bytes: int
    """Of one block of all its KV caches."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Its caches are there: it waits for passes."""

    memory: RankMemory


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    passes: int = 0
    """That it has begun."""
    collectives: int = 0
    """That it has entered."""
    memory: RankMemory | None = None


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """It cannot start or go on, and ends."""

    error: str
    consequence: bool = False
    """It failed in a collective: most likely another rank is the cause."""


class Died(msgspec.Struct, frozen=True, tag="died"):
    """A rank of another host has ended; its parent says so."""

    rank: int
    code: int
    """Exit status, or the negative number of a signal."""


# Control, from rank 0.


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    key: bytes
    """What passes of this engine begin with."""
    passes: str
    """zmq endpoint of the passes."""
    store_host: str
    store_port: int


class End(msgspec.Struct, frozen=True, tag="end"):
    """End at once. `error`: why, or "" where the engine was stopped."""

    error: str = ""


# Among the passes, from rank 0.


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """All ranks hear: connect with each other, and load."""


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Answer with Measured."""


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Make the KV caches and capture graphs, and answer with Prepared."""

    num_blocks: int
    """For sequences."""
    max_model_len: int


ToLead = Hello | Joined | RankLoading | Loaded | Measured | Prepared | Beat | RankFailed | Died
FromLead = Welcome | Beat | End
Order = Meet | Measure | Allocate

KEY_BYTES = 8
ORDER, PASS = 0, 1
_NO_BATCH = BatchShape(0, 0, 0, 0)
_HEADER = struct.Struct(f"<{KEY_BYTES}sBBHI{len(BatchShape._fields)}I")


@dataclass(frozen=True, slots=True)
class Header:
    """The first frame of a message among the passes; the second is an Order, or a batch's buffer."""

    key: bytes
    kind: int
    model: int = 0
    """Whose pass it is: 0 for the target, then the divided drafts."""
    number: int = 0
    """Of the pass, counted from 1: a gap is a lost message."""
    shape: BatchShape = _NO_BATCH

    def pack(self) -> bytes:
        return _HEADER.pack(self.key, self.kind, self.model, 0, self.number, *self.shape)

    @staticmethod
    def unpack(data: bytes) -> Header:
        key, kind, model, _, number, *shape = _HEADER.unpack(data)
        return Header(key, kind, model, number, BatchShape(*shape))
