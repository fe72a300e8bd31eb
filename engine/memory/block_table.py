"""BlockTable: the KV blocks of one sequence, in order, and which of them others may share.

`block_pool` knows which blocks exist and evicts them; keys and values lie in `kv_cache`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pilotfish.engine.memory.block_pool import DIGEST_SIZE, BlockPool
from pilotfish.engine.memory.cache_events import CacheOrigin


class BlockTable:
    """`blocks[i]` holds tokens [i * block_size, (i + 1) * block_size) of a sequence.

    Only full blocks of computed tokens are shared, and a claimed prefix never covers the last token; a sequence
    therefore writes only to blocks that it alone holds and that nobody can find.
    """

    def __init__(self, pool: BlockPool, salt: bytes = b"", origin: CacheOrigin = CacheOrigin()) -> None:  # noqa: B008
        """Only tables with the same `salt` share blocks. Whatever keys and values depend on besides the tokens goes
        into it, and whose they are; `origin` says the same to those who listen to the cache's events."""
        self.pool = pool
        self._origin = origin
        self.blocks = array("i")  # copied as it is into each step's block tables
        self._root = pool.root_of(salt)
        self._digested = 0  # blocks whose digests are known: claimed, or full and computed
        self._digest = self._root  # the digest of the last of them

    def claim_prefix(self, tokens: Sequence[int]) -> int:
        """Claim the longest cached chain of full blocks that begins `tokens`; return its length in tokens.

        At least one token is left over, as its logits must be computed. Raises ValueError unless the table is empty.
        """
        if self.blocks:
            raise ValueError(f"claim_prefix needs an empty table, but this one holds {len(self.blocks)} blocks")
        if not self.pool.prefix_caching:
            return 0
        for index in range((len(tokens) - 1) // self.pool.block_size):
            digest = self._next_digest(tokens, index)
            block = self.pool.claim(digest)
            if block is None:
                break
            self.blocks.append(block)
            self._digested, self._digest = index + 1, digest
        return len(self.blocks) * self.pool.block_size

    def reserve(self, length: int) -> bool:
        """Own blocks for the first `length` tokens; False, and nothing changed, if the pool has too few."""
        missing = -(-length // self.pool.block_size) - len(self.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        self.blocks.extend(blocks)
        return True

    def commit(self, tokens: Sequence[int], computed: int) -> None:
        """Let others find the blocks that lie within `tokens[:computed]`, whose keys and values are in the cache.

        Called after each step, with the same tokens as before or more of them; only newly full blocks take time.
        Never count a drafted token as computed before it is accepted: the next step overwrites it. Raises
        ValueError if `computed` exceeds the tokens or the table.
        """
        room = len(self.blocks) * self.pool.block_size
        if computed > min(len(tokens), room):
            raise ValueError(f"computed is {computed}, but there are {len(tokens)} tokens, and blocks for {room}")
        if not self.pool.prefix_caching:
            return
        found: list[tuple[int, bytes]] = []
        parents: list[bytes | None] = []
        for index in range(self._digested, computed // self.pool.block_size):
            parent, self._digest = self._digest, self._next_digest(tokens, index)
            # The first wins; a second one stays this table's own.
            if self.pool.register(self.blocks[index], self._digest):
                found.append((index, self._digest))
                parents.append(parent if index else None)
            self._digested = index + 1
        if found and self.pool.events is not None:
            self.pool.events.stored(found, parents, tokens, self.pool.block_size, self._origin)

    def release(self) -> None:
        """Give every block back. The table is empty then and can be used again, by the same sequence or another."""
        self.pool.release(reversed(self.blocks))  # a chain's tail is evicted before its head
        self.blocks = array("i")
        self._digested, self._digest = 0, self._root

    def slots(self, start: int, stop: int) -> NDArray[np.int64]:
        """The slots of tokens [start, stop) in the cache: (stop - start,) int64, block * block_size + offset.

        Raises IndexError for tokens beyond the blocks that are reserved.
        """
        size = self.pool.block_size
        first = start // size
        blocks = np.array(self.blocks[first : -(-stop // size)], dtype=np.int64)
        positions = np.arange(start - first * size, stop - first * size, dtype=np.int64)
        index, offset = np.divmod(positions, size)
        return blocks[index] * size + offset

    def _next_digest(self, tokens: Sequence[int], index: int) -> bytes:
        """The digest of the text up to the end of block `index`; `self._digest` is that of the block before it.

        Cryptographic, since a collision would show one client's text to another.
        """
        size = self.pool.block_size
        content = array("i", tokens[index * size : (index + 1) * size]).tobytes()
        return blake2b(self._digest + content, digest_size=DIGEST_SIZE).digest()
