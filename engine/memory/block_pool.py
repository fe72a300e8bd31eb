"""BlockPool: allocation, reference counts, prefix digests and eviction of the KV cache's blocks, by number.

It holds no tensors and no tokens: a block's content is known by the digest that its table registers (`block_table`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from pilotfish.engine.memory.cache_events import CacheEvents
from pilotfish.errors import ConfigError

DIGEST_SIZE = 16
"""Bytes of a block's digest."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Every block is exactly one of

    - free: nothing in it is worth keeping;
    - used: referenced by one table, or by several that share a prefix;
    - cached: referenced by none, but findable by its digest until it is evicted, least recently used first.

    Every operation takes constant time per block. `events` is told what can be found, and what no longer can. Raises
    ConfigError for sizes below 1.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, events: CacheEvents | None = None
    ) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.events = events
        # Secret: clients, who choose the tokens, could search for collisions.
        self._root = os.urandom(DIGEST_SIZE)
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def root_of(self, salt: bytes) -> bytes:
        """Return the parent digest of first blocks with this salt."""
        return blake2b(salt, key=self._root, digest_size=DIGEST_SIZE).digest() if salt else self._root

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that are referenced."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that are kept for the prefix cache alone."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and no digest, or None (and nothing changed) if fewer are available.

        Cached blocks are evicted only when no free ones are left.
        """
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def claim(self, digest: bytes) -> int | None:
        """Take a reference to the block that holds `digest`; None if there is none."""
        block = self._found.get(digest)
        if block is None:
            return None
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1
        return block

    def register(self, block: int, digest: bytes) -> bool:
        """Make a used block findable by `digest`. The first block of a digest wins: False if another one has it.

        Raises ValueError for a block that nobody references, or that has a digest.
        """
        if self._references[block] == 0 or self._digests[block] is not None:
            raise ValueError(f"block {block} must be referenced and without a digest to be registered")
        if digest in self._found:
            return False
        self._digests[block] = digest
        self._found[digest] = block
        return True

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each of `blocks`, in their order, which is the order in which those that stay
        cached will be evicted: give a chain's tail first, since a tail without its head can never be found.

        Raises ValueError for a block that nobody references.
        """
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is released, but nobody references it")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def clear(self) -> None:
        """Forget every block that could be found. Those in use stay with the tables that have them."""
        self._free.extend(reversed(self._cached))
        self._cached.clear()
        self._found.clear()
        self._digests = [None] * self.num_blocks
        if self.events is not None:
            self.events.cleared()

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None  # only blocks with a digest are cached
        del self._found[digest]
        self._digests[block] = None
        if self.events is not None:
            self.events.removed(digest)
        return block
