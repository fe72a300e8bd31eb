"""Messages between the ranks' processes, besides tensors and batches: msgspec structs in MessagePack. No torch."""

from __future__ import annotations

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.memory.usage import RankMemory

# Control channel, to the leader.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A worker asks to join, or (rank -1) the parent process of another host's workers."""

    rank: int
    host: str
    pid: int
    config: EngineConfig


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """The rank listens to the pass channel."""

    device: str
    """Type of the device that it computes on."""


class RankLoading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of a rank's start-up, as in `engine.process.messages.Loading`."""

    what: str
    share: float


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank's weights are loaded."""


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """The memory that a rank has for its KV caches, and what a block takes; see CacheRoom."""

    free: int
    """Bytes that could be allocated now."""
    block_bytes: int
    """Bytes of one block of all the rank's KV caches."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """The rank's caches are allocated and its passes captured: it waits for passes."""

    memory: RankMemory


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A heartbeat; a follower's has its progress."""

    passes: int = 0
    """Passes that it has begun."""
    collectives: int = 0
    """Collectives that it has entered."""
    memory: RankMemory | None = None


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank cannot start or go on, and ends."""

    error: str
    consequence: bool = False
    """It failed in a collective: most likely another rank is the cause."""


class Died(msgspec.Struct, frozen=True, tag="died"):
    """A rank of another host has ended; sent by its parent."""

    rank: int
    code: int
    """Exit status, or the negative number of a signal."""


# Control channel, from the leader.


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The process is admitted; these are the addresses that it needs."""

    key: bytes
    """Prefix of messages on this engine's pass channel."""
    passes: str
    """ZeroMQ endpoint of the pass channel."""
    store_host: str
    store_port: int


class End(msgspec.Struct, frozen=True, tag="end"):
    """End at once."""

    error: str = ""
    """Why, or "" where the engine was stopped."""


# Pass channel, from the leader.


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """All ranks listen: connect with each other, and load."""


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Answer with Measured, for steps of rank 0's limits: GPUs of several sizes would have different ones."""

    max_num_seqs: int
    max_batch_tokens: int


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Allocate the KV caches, capture graphs, and answer with Prepared."""

    num_blocks: int
    """Blocks for sequences."""
    max_model_len: int


ToLeader = Hello | Joined | RankLoading | Loaded | Measured | Prepared | Beat | RankFailed | Died
FromLeader = Welcome | Beat | End
Order = Meet | Measure | Allocate
