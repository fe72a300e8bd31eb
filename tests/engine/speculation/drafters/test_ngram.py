"""NgramDrafter against a scan of the whole text, and what it costs."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.draft import NO_DRAFT
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.ngram import NgramDrafter
from pilotfish.errors import ConfigError

TEXT = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), min_size=1, max_size=40))
LENGTHS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda pair: (max(pair), min(pair)))


def make_sequence(prompt: list[int], identity: str = "a") -> Sequence:
    request = Request(id=identity, prompt_ids=tuple(prompt), params=SamplingParams())
    return Sequence(request=request, seed=0, blocks=BlockTable(BlockPool(1, 16)))


def propose(drafter: NgramDrafter, sequence: Sequence, limit: int) -> tuple[int, ...]:
    (draft,) = drafter.propose([DraftRequest(sequence, limit)])
    assert draft.probs is None
    return draft.tokens


def scan(tokens: list[int], ngram_max: int, ngram_min: int, limit: int) -> tuple[int, ...]:
    for length in range(ngram_max, ngram_min - 1, -1):
        for start in range(len(tokens) - 1, length - 1, -1):
            if tokens[start - length : start] == tokens[-length:]:
                text = list(tokens)
                for offset in range(min(limit, 2 * length + 1)):  # a longer match, a longer draft
                    text.append(text[start + offset])
                return tuple(text[len(tokens) :])
    return ()


@given(TEXT, LENGTHS, st.integers(1, 12))
def test_drafts_what_a_scan_finds(tokens: list[int], lengths: tuple[int, int], limit: int) -> None:
    assert propose(NgramDrafter(*lengths), make_sequence(tokens), limit) == scan(tokens, *lengths, limit)


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, st.lists(st.integers(0, 9), max_size=12)), min_size=1, max_size=4), LENGTHS, st.data())
def test_catching_up_is_the_same_as_seeing_all_at_once(
    texts: list[tuple[list[int], list[int]]], lengths: tuple[int, int], data: st.DataObject
) -> None:
    """Several sequences, asked now and then in changing company, while tokens arrive a few at a time."""
    drafter = NgramDrafter(*lengths)
    sequences = [make_sequence(tokens[:1], str(i)) for i, (tokens, _) in enumerate(texts)]
    for step in range(12):
        for sequence, (tokens, pieces) in zip(sequences, texts, strict=True):
            count = len(sequence.tokens)
            sequence.tokens.extend(tokens[count : count + (pieces[step] if step < len(pieces) else 1)])
        asked = data.draw(st.lists(st.sampled_from(sequences), unique_by=id))
        drafts = drafter.propose([DraftRequest(sequence, 6) for sequence in asked])
        assert [draft.tokens for draft in drafts] == [scan(sequence.tokens, *lengths, 6) for sequence in asked]


def test_the_most_recent_of_the_longest_matches_counts() -> None:
    tokens = [1, 2, 3, 40, 9, 2, 3, 50, 9, 1, 2, 3, 60, 9, 2, 3, 70, 9, 1, 2, 3]
    assert propose(NgramDrafter(3, 2), make_sequence(tokens), 2) == (60, 9)
    assert propose(NgramDrafter(2, 2), make_sequence(tokens), 2) == (70, 9)


def test_a_loop_is_drafted_beyond_the_texts_end() -> None:
    assert propose(NgramDrafter(4, 2), make_sequence([7, 1, 2, 3, 1, 2, 3, 1, 2, 3]), 8) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert propose(NgramDrafter(4, 2), make_sequence([5, 5, 5]), 8) == (5,) * 5


def test_a_longer_match_gets_a_longer_draft() -> None:
    text = list(range(20))
    for length in (1, 2, 3, 4):
        draft = propose(NgramDrafter(4, 1), make_sequence([*text, 99, *text[3 : 3 + length]]), 20)
        assert draft == tuple(text[3 + length : 3 + length + 2 * length + 1])


def test_no_match_is_no_draft() -> None:
    drafter = NgramDrafter(4, 2)
    for tokens in ([1], [1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 9, 3]):
        (draft,) = drafter.propose([DraftRequest(make_sequence(tokens, str(tokens)), 8)])
        assert draft is NO_DRAFT
    assert drafter.propose([]) == []


class CountedTokens(list[int]):
    """Counts the tokens that are read."""

    reads = 0

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.reads += len(value) if isinstance(key, slice) else 1
        return value

    def __iter__(self):
        self.reads += len(self)
        return super().__iter__()


@pytest.mark.parametrize("period", [1, 10**6])
@pytest.mark.parametrize("added", [1, 5])
def test_a_step_reads_what_was_added_however_long_the_text_is(period: int, added: int) -> None:
    drafter = NgramDrafter(4, 2)
    sequence = make_sequence([0])
    tokens = sequence.tokens = CountedTokens(i % period for i in range(3000))
    propose(drafter, sequence, 8)
    assert tokens.reads < 3 * 3000 + 100
    for _ in range(100):
        tokens.extend((len(tokens) + i) % period for i in range(added))
        tokens.reads = 0
        propose(drafter, sequence, 8)
        assert tokens.reads < 3 * (added + 4) + 4 + 3 + 2 + 8


def test_release_frees_the_memory_and_forgets_the_text() -> None:
    drafter = NgramDrafter(4, 2)
    unrelated = make_sequence([2, 3, 1], "b")
    kept = unrelated.tokens = CountedTokens(unrelated.tokens * 100)
    assert propose(drafter, unrelated, 1) == (2,)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        sequence = make_sequence(list(range(1000, 4000)))
        propose(drafter, sequence, 8)
        drafter.release(sequence)
        drafter.release(sequence)  # never seen is as good as forgotten
        del sequence
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # bytes; the index of 3000 tokens takes more than a million
    assert propose(drafter, make_sequence([1000, 1001]), 8) == ()
    kept.reads = 0
    assert propose(drafter, unrelated, 1) == (2,)
    assert kept.reads < 20  # still indexed


@pytest.mark.parametrize(("ngram_max", "ngram_min"), [(4, 0), (2, 3), (0, 0)])
def test_impossible_lengths_are_refused(ngram_max: int, ngram_min: int) -> None:
    with pytest.raises(ConfigError, match=f"ngram_min is {ngram_min}"):
        NgramDrafter(ngram_max, ngram_min)
