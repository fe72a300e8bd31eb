"""What happens to the prefix cache, in the form of vLLM's KV events, for routers that send a prompt to the replica that
has its beginning: blocks stored, blocks removed, all of them cleared.

A batch is encoded as MessagePack: an array of its time, its events and a rank (always 0 here), the events as maps
with the key "type". The fields are those of vLLM 0.32's `distributed/kv_events.py`; fields that have vLLM's default are
left out. `event_publisher` sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import msgspec

MEDIUM = "GPU"
"""vLLM's name for the memory that a model computes with; routers count no other as warm."""


class CacheOrigin(NamedTuple):
    """What the blocks of a table depend on besides tokens."""

    adapter: str = ""
    """The name of the low-rank adapter; "" for the model itself."""
    salt: bytes = b""
    """The salt of the request: who does not share it does not find the blocks."""
    session: str | None = None
    """The client's name for its session."""


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, frozen=True, kw_only=True):
    """Consecutive blocks of a text that can be found from now on."""

    block_hashes: list[int]
    parent_block_hash: int | None
    """The hash of the block before the first; None at the beginning of a text."""
    token_ids: list[int]
    """`block_size` for each block."""
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    """For each block, the adapter's name and the salt in hexadecimal, as far as there are any."""
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, frozen=True, kw_only=True):
    """Blocks that are gone."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """The cache is empty: a new engine's, or one that was reset."""


CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, frozen=True):
    ts: float
    """Seconds since 1970."""
    events: list[CacheEvent]
    data_parallel_rank: int = 0


def public_hash(digest: bytes) -> int:
    """Return the hash by which others know a block: 63 bits that say nothing about its digest, which would let those
    who choose tokens search for collisions. 63, since readers with signed integers would refuse some of 64."""
    return int.from_bytes(blake2b(digest, digest_size=8, person=b"kv event").digest()) >> 1


class CacheEvents:
    """Collects events until they are taken. Begins with AllBlocksCleared: whoever listened to an engine before this one
    must forget what it had."""

    def __init__(self) -> None:
        self._pending: list[CacheEvent] = [AllBlocksCleared()]

    def stored(
        self, found: Sequence[tuple[int, bytes]], parents: Sequence[bytes | None], tokens: Sequence[int],
        block_size: int, origin: CacheOrigin,
    ) -> None:  # fmt: skip
        """Record blocks of one text that can be found now: (index in the text, digest) of each, in order. `parents`:
        the digests of the blocks before them, None before the first; `tokens`: the text."""
        for first, stop in _runs([index for index, _ in found]):
            digests = [digest for _, digest in found[first:stop]]
            start, parent = found[first][0], parents[first]
            key = tuple(filter(None, (origin.adapter, origin.salt.hex()))) or None
            self._pending.append(
                BlockStored(
                    block_hashes=list(map(public_hash, digests)),
                    parent_block_hash=None if parent is None else public_hash(parent),
                    token_ids=list(tokens[start * block_size : (start + len(digests)) * block_size]),
                    block_size=block_size,
                    lora_id=None,
                    medium=MEDIUM,
                    lora_name=origin.adapter or None,
                    extra_keys=None if key is None else [key] * len(digests),
                    session_id=origin.session,
                )
            )

    def removed(self, digest: bytes) -> None:
        """Record that a block was evicted. Removals in a row are one event."""
        last = self._pending[-1] if self._pending else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(public_hash(digest))
        else:
            self._pending.append(BlockRemoved(block_hashes=[public_hash(digest)], medium=MEDIUM))

    def cleared(self) -> None:
        """Record that all blocks are gone, whatever happened before."""
        self._pending = [AllBlocksCleared()]

    def take(self) -> list[CacheEvent]:
        """Return the events since they were last taken, in order."""
        taken, self._pending = self._pending, []
        return taken


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of positions in which indices are consecutive."""
    cuts = [i + 1 for i, (one, next_) in enumerate(pairwise(indices)) if next_ != one + 1]
    return list(pairwise([0, *cuts, len(indices)])) if indices else []
