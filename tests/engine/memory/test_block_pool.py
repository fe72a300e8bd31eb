"""BlockPool and BlockTable against a plain model, under random histories of sequences that share prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.memory.cache_events import AllBlocksCleared, BlockStored, CacheEvent, CacheEvents, CacheOrigin
from pilotfish.errors import ConfigError

Text = tuple[bytes | int | None, ...]
"""A salt and tokens."""

TOKENS = st.integers(0, 1)
PICK = st.integers(0, 99)
SALTS = st.sampled_from([b"", b"", b"one adapter", b"another"])


@dataclass(eq=False)
class Running:
    """A sequence, and what the model says of its blocks."""

    table: BlockTable
    tokens: list[int]
    salt: bytes = b""
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    offered: int = 0
    """Blocks that others were told of, or had already."""

    def text(self, stop: int, tokens: list[int] | None = None) -> Text:
        """What blocks that hold the first `stop` tokens are known by."""
        return (self.salt, *(tokens or self.tokens)[:stop])


class Listener:
    """What a router knows of a cache from its events alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.cached: set[int] = set()
        self.texts: dict[int, Text] = {}
        """Of all blocks that there ever were, by their hashes."""

    def hear(self, events: list[CacheEvent]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.cached.clear()
            elif isinstance(event, BlockStored):
                self._learn(event)
            else:
                assert self.cached.issuperset(event.block_hashes)
                self.cached.difference_update(event.block_hashes)

    def _learn(self, event: BlockStored) -> None:
        keys = event.extra_keys or [None] * len(event.block_hashes)
        assert len(keys) == len(event.block_hashes)
        assert len(event.token_ids) == len(keys) * self._size == len(keys) * event.block_size
        text: Text = (bytes.fromhex(keys[0][0]) if keys[0] else b"",)
        if event.parent_block_hash is not None:
            text = self.texts[event.parent_block_hash]
        for i, hash_ in enumerate(event.block_hashes):
            assert hash_ not in self.cached
            text = (*text, *event.token_ids[i * self._size : (i + 1) * self._size])
            assert self.texts.setdefault(hash_, text) == text
            self.cached.add(hash_)


class PoolMachine(RuleBasedStateMachine):
    """The model knows a block by its table's salt and the whole text up to its end, and writes these where the engine
    would write keys and values: whatever is shared must have been computed from exactly the text that claims it."""

    @initialize(
        num_blocks=st.integers(1, 10), block_size=st.integers(1, 3), prefix_caching=st.sampled_from([True, True, False])
    )
    def start(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.events = CacheEvents()
        self.pool = BlockPool(num_blocks, block_size, prefix_caching, self.events)
        self.listener = Listener(block_size)
        self.size = block_size
        self.caching = prefix_caching
        self.running: list[Running] = []
        self.free = set(range(num_blocks))
        self.references: dict[int, int] = {}
        self.cached: list[int] = []  # least recently used first
        self.found: dict[Text, int] = {}
        self.written: dict[int, Text] = {}  # by slot: the text that its key and value were computed from

    # What sequences do

    @rule(prompt=st.lists(TOKENS, min_size=1, max_size=10), salt=SALTS)
    def admit(self, prompt: list[int], salt: bytes) -> None:
        sequence = Running(BlockTable(self.pool, salt, CacheOrigin(salt=salt)), prompt, salt)
        self.running.append(sequence)
        self.claim(sequence)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, extra=st.lists(TOKENS, max_size=4), salt=SALTS)
    def admit_again(self, pick: int, extra: list[int], salt: bytes) -> None:
        """Another client continues a text that is running."""
        self.admit([*self.picked(pick).tokens, *extra], salt)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, rows=st.integers(1, 8))
    def prefill(self, pick: int, rows: int) -> None:
        sequence = self.picked(pick)
        stop = min(sequence.computed + rows, len(sequence.tokens))
        if self.reserve(sequence, stop):
            self.write(sequence, sequence.tokens, stop)
            self.commit(sequence, stop)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, draft=st.lists(TOKENS, max_size=5), accepted=st.integers(0, 5), drawn=TOKENS)
    def decode(self, pick: int, draft: list[int], accepted: int, drawn: int) -> None:
        """Verify a draft: compute all of it, keep a prefix and one token more."""
        sequence = self.picked(pick)
        drafted = sequence.tokens + draft
        if self.reserve(sequence, len(drafted)):
            self.write(sequence, drafted, len(drafted))
            sequence.tokens = [*sequence.tokens, *draft[:accepted], drawn]
            self.commit(sequence, len(sequence.tokens) - 1)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, length=st.integers(0, 40))
    def reserve_ahead(self, pick: int, length: int) -> None:
        self.reserve(self.picked(pick), length)

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def exhaust(self, pick: int) -> None:
        sequence = self.picked(pick)
        room = len(sequence.blocks) + len(self.free) + len(self.cached)
        assert not self.reserve(sequence, room * self.size + 1)
        assert self.reserve(sequence, room * self.size)

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def finish(self, pick: int) -> None:
        sequence = self.picked(pick)
        self.running.remove(sequence)
        self.release(sequence)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.free.update(self.cached)
        self.cached, self.found = [], {}

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        sequence = self.picked(pick)
        self.release(sequence)
        self.claim(sequence)

    # The same in the model, compared at once

    def picked(self, pick: int) -> Running:
        return self.running[pick % len(self.running)]

    def claim(self, sequence: Running) -> None:
        found: list[int] = []
        while self.caching and (stop := (len(found) + 1) * self.size) < len(sequence.tokens):
            block = self.found.get(sequence.text(stop))
            if block is None:
                break
            found.append(block)
        sequence.computed = sequence.table.claim_prefix(sequence.tokens)
        assert sequence.computed == len(found) * self.size < len(sequence.tokens)
        assert list(sequence.table.blocks) == found
        sequence.blocks = found
        sequence.offered = len(found)
        for block in found:
            if block in self.cached:
                self.cached.remove(block)
            self.references[block] = self.references.get(block, 0) + 1
        for position, slot in enumerate(sequence.table.slots(0, sequence.computed)):
            assert self.written[int(slot)] == sequence.text(position + 1)

    def reserve(self, sequence: Running, length: int) -> bool:
        missing = max(0, -(-length // self.size) - len(sequence.blocks))
        evicted = max(0, missing - len(self.free))
        reserved = sequence.table.reserve(length)
        assert reserved == (evicted <= len(self.cached))
        if not reserved:
            assert list(sequence.table.blocks) == sequence.blocks
            return False
        now = list(sequence.table.blocks)
        held, added = now[: len(sequence.blocks)], now[len(sequence.blocks) :]
        assert held == sequence.blocks
        assert len(added) == len(set(added)) == missing
        fresh = added[: missing - evicted]
        assert self.free.issuperset(fresh)
        assert added[missing - evicted :] == self.cached[:evicted]
        self.free.difference_update(fresh)
        self.cached = self.cached[evicted:]
        self.found = {text: block for text, block in self.found.items() if block not in added}
        self.references.update(dict.fromkeys(added, 1))
        sequence.blocks = held + added
        return True

    def write(self, sequence: Running, tokens: list[int], stop: int) -> None:
        shareable = set(self.found.values())
        for position, slot in enumerate(sequence.table.slots(sequence.computed, stop), sequence.computed):
            block = sequence.blocks[position // self.size]
            assert slot == block * self.size + position % self.size
            assert self.references[block] == 1
            assert block not in shareable
            self.written[int(slot)] = sequence.text(position + 1, tokens)

    def commit(self, sequence: Running, computed: int) -> None:
        sequence.computed = computed
        sequence.table.commit(sequence.tokens, computed)
        if self.caching:
            # Newly full blocks alone: one whose text another block had, which was evicted since, is not offered again.
            for index in range(sequence.offered, computed // self.size):
                self.found.setdefault(sequence.text((index + 1) * self.size), sequence.blocks[index])
                sequence.offered = index + 1

    def release(self, sequence: Running) -> None:
        for block in reversed(sequence.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                del self.references[block]
                if block in self.found.values():
                    self.cached.append(block)
                else:
                    self.free.add(block)
        sequence.blocks = []
        sequence.computed = sequence.offered = 0
        for _ in range(2):  # the second time changes nothing
            sequence.table.release()
            assert list(sequence.table.blocks) == []
            self.counts()

    # What always holds

    @invariant()
    def counts(self) -> None:
        pool = self.pool
        assert (pool.used, pool.cached) == (len(self.references), len(self.cached))
        assert pool.available == len(self.free) + len(self.cached) == pool.num_blocks - pool.used
        assert not self.free & self.references.keys()
        assert not set(self.cached) & (self.references.keys() | self.free)

    @invariant()
    def listeners_know_what_can_be_found(self) -> None:
        self.listener.hear(self.events.take())
        known = [self.listener.texts[hash_] for hash_ in self.listener.cached]
        assert sorted(map(repr, known)) == sorted(map(repr, self.found))

    @invariant()
    def shared_blocks_hold_the_same_text(self) -> None:
        holders: dict[int, list[tuple[int, Running]]] = {}
        for sequence in self.running:
            for index, block in enumerate(sequence.table.blocks):
                holders.setdefault(block, []).append((index, sequence))
        assert {block: len(held) for block, held in holders.items()} == self.references
        for held in holders.values():
            if len(held) > 1:
                (index,) = {index for index, _ in held}
                stop = (index + 1) * self.size
                assert all(sequence.computed >= stop for _, sequence in held)
                assert len({sequence.text(stop) for _, sequence in held}) == 1

    @invariant()
    def findable_blocks_hold_their_text(self) -> None:
        for text, block in self.found.items():
            for offset in range(self.size):
                assert self.written[block * self.size + offset] == text[: len(text) - self.size + offset + 1]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        while self.running:
            self.finish(0)
        assert (self.pool.used, self.pool.available) == (0, self.pool.num_blocks)
        last = Running(BlockTable(self.pool), [0])
        assert self.reserve(last, self.pool.num_blocks * self.size)  # evicts all that is cached, in the model's order
        assert sorted(last.blocks) == list(range(self.pool.num_blocks))


PoolMachine.TestCase.settings = settings(
    max_examples=400, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestPoolAgainstModel = PoolMachine.TestCase


def computed_table(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> BlockTable:
    table = BlockTable(pool, salt)
    assert table.reserve(len(tokens))
    table.commit(tokens, len(tokens))
    return table


def test_the_tail_of_a_released_chain_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    computed_table(pool, text).release()
    for evicted in range(1, 4):
        other = BlockTable(pool)
        assert other.reserve(evicted * 2)
        other.release()  # nothing was committed, so these are free again
        again = BlockTable(pool)
        assert again.claim_prefix([*text, 9]) == len(text) - 2 * evicted
        again.release()


def test_the_least_recently_used_text_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=3, block_size=2)
    for text in ([1, 1], [2, 2], [3, 3]):
        computed_table(pool, text).release()
    used_again = BlockTable(pool)
    assert used_again.claim_prefix([1, 1, 0]) == 2
    used_again.release()
    assert BlockTable(pool).reserve(4)
    assert BlockTable(pool).claim_prefix([2, 2, 0]) == BlockTable(pool).claim_prefix([3, 3, 0]) == 0
    assert BlockTable(pool).claim_prefix([1, 1, 0]) == 2


def test_two_sequences_that_compute_the_same_text_at_once() -> None:
    pool = BlockPool(num_blocks=6, block_size=2)
    text = [1, 2, 3, 4, 5]
    first, second = computed_table(pool, text[:4]), computed_table(pool, text[:4])
    assert not set(first.blocks) & set(second.blocks)
    third = BlockTable(pool)
    assert third.claim_prefix(text) == 4
    assert third.blocks == first.blocks
    second.release()
    assert pool.cached == 0  # the second's blocks were never findable
    first.release()
    third.release()
    assert (pool.cached, pool.available) == (2, 6)


def test_a_released_table_keeps_its_salt() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    other, table = computed_table(pool, [1, 2]), computed_table(pool, [1, 2], b"an adapter")
    own = list(table.blocks)
    other.release()
    table.release()
    assert table.claim_prefix([1, 2, 3]) == 2
    assert list(table.blocks) == own


def test_rejected_tokens_are_never_shared() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    table = BlockTable(pool)
    assert table.reserve(7)  # three tokens and a draft of four, of which none is accepted
    table.commit([1, 2, 3, 9], computed=3)
    table.release()
    assert BlockTable(pool).claim_prefix([1, 2, 3, 9, 9, 9, 9]) == 2


class CountedTokens(list[int]):
    """Counts the tokens that are read."""

    reads = 0

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.reads += len(value) if isinstance(key, slice) else 1
        return value


def test_commit_reads_each_token_once() -> None:
    pool = BlockPool(num_blocks=100, block_size=4)
    table, tokens = BlockTable(pool), CountedTokens(range(400))
    assert table.reserve(400)
    for computed in range(401):
        table.commit(tokens, computed)
        assert tokens.reads == computed // 4 * 4
    table.release()
    assert table.claim_prefix(tokens) == 396
    tokens.reads = 0
    assert table.reserve(400)
    table.commit(tokens, 400)
    assert tokens.reads == 4


def test_slots() -> None:
    table = BlockTable(BlockPool(num_blocks=5, block_size=3))
    assert table.reserve(13)
    expected = [table.blocks[position // 3] * 3 + position % 3 for position in range(15)]
    for start in range(16):
        for stop in range(start, 16):
            slots = table.slots(start, stop)
            assert slots.dtype == np.int64
            assert slots.tolist() == expected[start:stop]
    with pytest.raises(IndexError):
        table.slots(14, 16)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        BlockPool(0, 16)
    with pytest.raises(ConfigError, match="block_size is -1"):
        BlockPool(16, -1)
    pool = BlockPool(num_blocks=4, block_size=2)
    table = BlockTable(pool)
    assert table.reserve(4)
    with pytest.raises(ValueError, match="empty table"):
        table.claim_prefix([1, 2, 3])
    with pytest.raises(ValueError, match="blocks for 4"):
        table.commit([1, 2, 3, 4, 5, 6], 5)
    with pytest.raises(ValueError, match="2 tokens"):
        table.commit([1, 2], 3)
    blocks = table.blocks
    table.release()
    with pytest.raises(ValueError, match="nobody references"):
        pool.release(blocks)
    assert (pool.used, pool.available) == (0, 4)
