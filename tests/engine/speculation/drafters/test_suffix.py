"""SuffixDrafter against a search of the whole text, and what it costs."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.suffix import COUNTED, SuffixDrafter

TEXT = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), min_size=1, max_size=COUNTED))


def evidence(matched: int) -> int:
    return min(matched, 8) + sum(matched >= length for length in (16, 32, 64))


def make_sequence(prompt: list[int], identity: str = "a") -> Sequence:
    request = Request(id=identity, prompt_ids=tuple(prompt), params=SamplingParams())
    return Sequence(request=request, seed=0, blocks=BlockTable(BlockPool(1, 16)))


def propose(drafter: SuffixDrafter, sequence: Sequence, limit: int) -> Draft:
    (draft,) = drafter.propose([DraftRequest(sequence, limit)])
    assert draft.probs is None
    return draft


def followers(text: list[int], context: list[int]) -> list[int]:
    """The tokens that follow a context, in the order of the text."""
    size = len(context)
    return [text[end] for end in range(size, len(text)) if text[end - size : end] == context]


def search(text: list[int], limit: int) -> tuple[tuple[int, ...], int]:
    """The draft and the match's length."""
    context = next((text[start:] for start in range(1, len(text)) if followers(text, text[start:])), None)
    if context is None:
        return (), 0
    tokens: list[int] = []
    matched, length = len(context), limit
    while len(tokens) < length:
        seen = followers(text, context)
        while not seen:
            context = context[1:]
            seen = followers(text, context)
        best = max(seen, key=lambda token: (seen.count(token), len(seen) - seen[::-1].index(token)))
        if not tokens:
            length = min(limit, 2 * matched + seen.count(best))
        tokens.append(best)
        context = [*context, best]
    return tuple(tokens), matched


@settings(max_examples=300)
@given(TEXT, st.integers(1, 12))
def test_drafts_what_a_search_finds(text: list[int], limit: int) -> None:
    draft = propose(SuffixDrafter(), make_sequence(text), limit)
    tokens, matched = search(text, limit)
    assert (draft.tokens, draft.evidence) == (tokens, evidence(matched))
    assert draft.drafter == ("suffix" if tokens else "")


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, st.lists(st.integers(0, 9), max_size=12)), min_size=1, max_size=4), st.data())
def test_catching_up_is_the_same_as_seeing_all_at_once(
    texts: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    """Several sequences, asked now and then in changing company, while tokens arrive a few at a time."""
    drafter = SuffixDrafter()
    sequences = [make_sequence(tokens[:1], str(i)) for i, (tokens, _) in enumerate(texts)]
    for step in range(12):
        for sequence, (tokens, pieces) in zip(sequences, texts, strict=True):
            count = len(sequence.tokens)
            sequence.tokens.extend(tokens[count : count + (pieces[step] if step < len(pieces) else 1)])
        asked = data.draw(st.lists(st.sampled_from(sequences), unique_by=id))
        drafts = drafter.propose([DraftRequest(sequence, 6) for sequence in asked])
        assert [draft.tokens for draft in drafts] == [search(sequence.tokens, 6)[0] for sequence in asked]


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(0, 2**32))
def test_long_texts_match_their_longest_suffix(size: int, seed: int) -> None:
    """Counts may lag behind there; the match does not, and what is drafted did follow it."""
    rng = random.Random(seed)
    text = [rng.randrange(size) for _ in range(200)]
    draft = propose(SuffixDrafter(), make_sequence(text), 1)
    _, matched = search(text, 1)
    assert draft.evidence == evidence(matched)
    assert draft.tokens[0] in followers(text, text[-matched:])


def test_the_most_frequent_follower_counts_then_the_most_recent() -> None:
    assert propose(SuffixDrafter(), make_sequence([1, 2, 7, 1, 2, 7, 1, 2, 8, 1, 2]), 1).tokens == (7,)
    assert propose(SuffixDrafter(), make_sequence([1, 2, 7, 1, 2, 8, 1, 2]), 1).tokens == (8,)


def test_a_loop_is_drafted_beyond_the_texts_end() -> None:
    assert propose(SuffixDrafter(), make_sequence([7, *[1, 2, 3] * 3]), 8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)
    assert propose(SuffixDrafter(), make_sequence([5] * 4000), 8).tokens == (5,) * 8


def test_longer_and_more_frequent_matches_get_longer_drafts() -> None:
    text = list(range(40))
    for length in (1, 2, 3, 4):
        once = [*text, 99, *text[3 : 3 + length]]
        assert propose(SuffixDrafter(), make_sequence(once), 40).tokens == tuple(text[3 + length : 4 + 3 * length])
    thrice = [*text[:10], 97, *text[:10], 98, *text[:10], 99, 3]
    assert len(propose(SuffixDrafter(), make_sequence(thrice), 40).tokens) == 2 + 3


def test_no_match_is_no_draft() -> None:
    drafter = SuffixDrafter()
    for tokens in ([1], [1, 2], [1, 2, 3, 4, 5, 6], [1, 1, 1, 2]):
        assert propose(drafter, make_sequence(tokens, str(tokens)), 8) is NO_DRAFT
    assert drafter.propose([]) == []


def text_of(kind: str, length: int) -> list[int]:
    rng = random.Random(3)
    if kind == "words":  # frequencies as those of a language, and repeated phrases
        text: list[int] = []
        while len(text) < length:
            start = rng.randrange(len(text) + 1)
            text += text[start : start + 12] if rng.random() < 0.1 else [int(rng.paretovariate(0.8)) % 50_000] * 1
        return text[:length]
    return {"loop": [i % 7 for i in range(length)], "same": [1] * length}[kind]


@pytest.mark.parametrize("kind", ["words", "loop", "same"])
def test_time_is_proportional_to_the_tokens(kind: str) -> None:
    """A step's work does not depend on what is indexed already; bounds are ten times what is seen on a slow machine."""
    text = text_of(kind, 6000)
    drafter = SuffixDrafter()
    sequences = [make_sequence(text, str(i)) for i in range(8)]
    start = time.process_time()
    propose(drafter, sequences[0], 8)
    assert time.process_time() - start < 0.5
    drafter.propose([DraftRequest(sequence, 8) for sequence in sequences])
    times = []
    for step in range(20):
        for sequence in sequences:
            sequence.tokens.append(text[step])
        start = time.process_time()
        drafter.propose([DraftRequest(sequence, 8) for sequence in sequences])
        times.append(time.process_time() - start)
    assert min(times) < 0.003


def test_memory_is_proportional_to_the_tokens_and_release_frees_it() -> None:
    drafter = SuffixDrafter()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        held = []
        for length in (2000, 4000):
            sequence = make_sequence(text_of("words", length))
            empty, _ = tracemalloc.get_traced_memory()
            propose(drafter, sequence, 8)
            held.append(tracemalloc.get_traced_memory()[0] - empty)
            drafter.release(sequence)
            drafter.release(sequence)  # never seen is as good as forgotten
            del sequence
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held[1] < 2.3 * held[0]
    assert held[1] < 4000 * 1000  # bytes
    assert after - before < 100_000
    assert propose(drafter, make_sequence([1, 2]), 8) is NO_DRAFT


def test_the_index_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.engine.speculation.drafters.suffix.MOST_TOKENS", 100)
    drafter = SuffixDrafter()
    sequences = [make_sequence([1, 2] * 20, f"s{i}") for i in range(4)]
    assert [bool(propose(drafter, each, 4).tokens) for each in sequences] == [True, True, False, False]
    drafter.release(sequences[0])
    assert [bool(propose(drafter, each, 4).tokens) for each in sequences[1:3]] == [True, True]
