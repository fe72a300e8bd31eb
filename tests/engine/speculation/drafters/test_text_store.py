"""TextStore against lists of texts: what is found, what is forgotten, that it stays within its bytes, and that owners
never meet."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.speculation.drafters import text_store
from pilotfish.engine.speculation.drafters.text_store import (
    FOUND,
    GRAM,
    LARGEST,
    LENGTHS,
    MOST_TOKENS,
    SMALLEST,
    TextStore,
)

SECRET = 12345
SHORT = st.lists(st.integers(0, 2), max_size=60)


def ends(texts: list[list[int]], context: list[int]) -> list[tuple[int, int, int]]:
    """(tokens that agree as LENGTHS count them, text, place in it) of all occurrences, the latest first."""
    found = []
    for number, text in enumerate(texts):
        for end in range(GRAM, len(text)):
            agreed = [n for n in LENGTHS if n <= min(end, len(context)) and text[end - n : end] == context[-n:]]
            if agreed:
                found.append((agreed[-1], number, end))
    return sorted(found, key=lambda each: each[1:], reverse=True)


@settings(max_examples=200)
@given(st.lists(SHORT, max_size=6), SHORT)
def test_finds_what_a_search_of_all_texts_finds(texts: list[list[int]], context: list[int]) -> None:
    store = TextStore(SMALLEST, SECRET)
    for text in texts:
        store.add(b"a", text)
    space = store.space_of(b"a")
    found = store.find(space, context)
    searched = ends(texts, context)
    seen = searched[: text_store.TRIED]
    longest = max((length for length, _, _ in seen), default=0)
    wanted = [texts[number][end:] for length, number, end in seen if length == longest][:FOUND]
    assert [store.read(space, match.place, 1000) for match in found] == wanted
    assert {match.length for match in found} <= {longest}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), st.integers(0, 900)), min_size=1, max_size=120),
    st.integers(0, 2**32),
)
def test_nobody_reads_anothers_text_and_the_bytes_suffice(adds: list[tuple[int, int, int]], secret: int) -> None:
    """Owners have tokens of their own, so that a foreign one is seen. The store is full several times over, owners come
    back, and there are more of them than there are numbers for them."""
    store = TextStore(SMALLEST, secret)
    assert store.nbytes <= SMALLEST
    sizes = [each.nbytes for each in (store._cells, store._heads, store._earlier)]
    for owner, kind, length in adds:
        own = range(1000 * (owner + 1), 1000 * (owner + 1) + 7)
        text = [own[i * (kind + 1) % 7] for i in range(length)]
        name = b"%d" % owner
        store.add(name, text)
        assert store.tokens <= store.capacity
        assert len(store._spaces) == len(store._owners) == len(store._texts) <= store._most_spaces
        for other in range(12):
            space, theirs = store.space_of(b"%d" % other), range(1000 * (other + 1), 1000 * (other + 1) + 7)
            for context in (text, [theirs[i % 7] for i in range(20)]):
                for match in store.find(space, context[-100:]):
                    read = store.read(space, match.place, 1000)
                    assert read
                    assert set(read) <= set(theirs)
        if length > GRAM:
            assert store.space_of(name)
    assert sizes == [each.nbytes for each in (store._cells, store._heads, store._earlier)]


def test_what_is_repeated_stays_and_what_is_not_goes() -> None:
    store = TextStore(SMALLEST, SECRET)
    used, unused = list(range(50)), list(range(100, 150))
    store.add(b"a", used)
    store.add(b"a", unused)
    for i in range(3 * store.capacity // 100):
        store.add(b"a", [1000 + i * 100 + j for j in range(100)])
        if i % 20 == 0:
            assert store.find(store.space_of(b"a"), used[:20])
            store.add(b"a", used)
    space = store.space_of(b"a")
    assert store.find(space, used[:20])
    assert not store.find(space, unused[:20])


def test_an_owner_whose_texts_are_gone_is_forgotten_and_its_number_says_nothing() -> None:
    store = TextStore(SMALLEST, SECRET)
    secret = list(range(7, 60))
    store.add(b"a", secret)
    gone = store.space_of(b"a")
    for i in range(3 * store.capacity // 100):
        store.add(b"b", [1000 + i * 100 + j for j in range(100)])
    assert store.space_of(b"a") == 0
    for i in range(store._most_spaces):  # all numbers are given anew
        store.add(b"c%d" % i, list(range(5000, 5010)))
    assert gone in store._owners
    assert not store.find(gone, secret[:20])
    assert not (store._cells & (MOST_TOKENS - 1) == secret[0])[store._cells >> 19 == gone].any()


def test_more_owners_than_numbers_drop_the_oldest() -> None:
    store = TextStore(SMALLEST, SECRET)
    owners = [b"%d" % i for i in range(store._most_spaces + 5)]
    for owner in owners:
        store.add(owner, [1, 2, 3, 4, 5, 6])
    assert [store.space_of(owner) > 0 for owner in owners] == [False] * 5 + [True] * store._most_spaces


def test_memory_that_python_takes_is_within_the_bytes() -> None:
    """With as many owners as there may be, of the longest names that there are."""
    tracemalloc.start()
    try:
        store = TextStore(1 << 20, SECRET)
        for number in range(2 * store._most_spaces):
            store.add(number.to_bytes(16), list(range(100)))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= 1 << 20


def test_texts_that_cannot_be_kept_are_left_out() -> None:
    store = TextStore(SMALLEST, SECRET)
    for text in ([], [1] * GRAM, [1, 2, 3, 4, MOST_TOKENS, 6]):
        store.add(b"a", text)
    assert store.space_of(b"a") == 0
    assert store.tokens == 0
    store.add(b"a", list(range(2 * store.capacity)))  # its end is kept
    (match,) = store.find(store.space_of(b"a"), list(range(2 * store.capacity - 50, 2 * store.capacity - 10)))
    assert store.read(store.space_of(b"a"), match.place, 100)[-1] == 2 * store.capacity - 1
    assert store.find(store.space_of(b"a"), [MOST_TOKENS, 1, 2, 3]) == []


@pytest.mark.parametrize("nbytes", [0, SMALLEST - 1, LARGEST + 1])
def test_sizes_are_checked(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"between {SMALLEST} and {LARGEST}"):
        TextStore(nbytes)


def laps(store: TextStore) -> Iterator[int]:
    while store._written < 4 * store.capacity:
        yield store._written


def test_a_chain_through_overwritten_texts_ends() -> None:
    store = TextStore(SMALLEST, SECRET)
    for written in laps(store):
        store.add(b"a", [written % 3, *[1] * 40])
        assert len(store.find(store.space_of(b"a"), [1] * 30)) == FOUND
