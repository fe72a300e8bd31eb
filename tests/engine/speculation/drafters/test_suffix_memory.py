"""SuffixMemoryDrafter: what it drafts from the past, whose past, and at what cost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.corpus import read_corpus
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, LongDrafter
from pilotfish.engine.speculation.drafters.suffix_memory import SuffixMemoryDrafter, make
from pilotfish.engine.speculation.drafters.text_store import SMALLEST
from pilotfish.errors import ConfigError

RECORD = [*range(10, 30), 77, *range(30, 60)]
"""A text with no repetition."""


class Asked:
    """A drafter, and sequences that ask it."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        self.drafter = SuffixMemoryDrafter(nbytes, 16, secret=1)
        self.made = 0

    def begin(
        self, prompt: Seq[int], tenant: str = "", salt: bytes = b"", drafters: Seq[str] = ("suffix-memory",)
    ) -> Sequence:
        self.made += 1
        request = Request(
            id=str(self.made), prompt_ids=tuple(prompt), params=SamplingParams(), tenant=tenant, salt=salt
        )
        return Sequence(request, seed=0, blocks=BlockTable(BlockPool(1, 16)), drafters=tuple(drafters))

    def draft(self, sequence: Sequence, limit: int = 16) -> Draft:
        (draft,) = self.drafter.propose([DraftRequest(sequence, limit)])
        assert draft is NO_DRAFT or (draft.tokens and draft.drafter == "suffix-memory")
        assert len(draft.classes) == len(draft.tokens) <= limit
        assert all(0 <= each < 1000 for each in draft.classes)
        return draft

    def answer(self, prompt: Seq[int], answer: Seq[int], **whose: object) -> tuple[int, int]:
        """Decode an answer with drafts. Return the steps, and the drafted tokens that were right."""
        sequence = self.begin(prompt, **whose)  # type: ignore[arg-type]
        rest, steps, right = list(answer), 0, 0
        while rest:
            drafted = self.draft(sequence, min(16, len(rest) - 1)).tokens if len(rest) > 1 else ()
            agreed = next((i for i, (a, b) in enumerate(zip(drafted, rest, strict=False)) if a != b), len(drafted))
            sequence.tokens += rest[: agreed + 1]
            rest, steps, right = rest[agreed + 1 :], steps + 1, right + agreed
        self.drafter.release(sequence)
        return steps, right


def test_an_answer_of_before_is_drafted_to_its_end() -> None:
    asked = Asked()
    assert asked.answer([1, 2, 3, 4, 5], RECORD) == (len(RECORD), 0)
    steps, right = asked.answer([1, 2, 3, 4, 5], RECORD)
    assert steps + right == len(RECORD)
    assert steps <= 5  # of drafts of 16


@pytest.mark.parametrize("change", ["replaced", "longer", "shorter", "missing", "inserted"])
def test_after_a_change_it_comes_back_to_the_text(change: str) -> None:
    old = [*RECORD[:20], 900, *RECORD[20:]] if change == "missing" else RECORD
    new = {
        "replaced": [*RECORD[:20], 901, *RECORD[21:]],
        "longer": [*RECORD[:20], 901, 902, 903, *RECORD[21:]],
        "shorter": [*RECORD[:20], *RECORD[21:]],
        "missing": RECORD,
        "inserted": [*RECORD[:20], 901, 902, *RECORD[20:]],
    }[change]
    asked = Asked()
    asked.answer([1, 2, 3, 4, 5], old)
    steps, _ = asked.answer([1, 2, 3, 4, 5], new)
    assert steps <= 10


def test_what_most_texts_go_on_with_is_drafted_and_shares_tell_classes_apart() -> None:
    asked = Asked()
    for last in (8, 7, 7, 7, 7):
        asked.answer([1, 2, 3, 4, 5], [last, 100 + last])
    most = asked.draft(asked.begin([9, 1, 2, 3, 4, 5]))
    assert most.tokens[:2] == (7, 107)
    assert most.classes[0] != most.classes[1]  # four of five, then all of four
    asked.answer([1, 2, 3, 4, 5], [8, 108])
    assert asked.draft(asked.begin([9, 1, 2, 3, 4, 5])).classes[0] != most.classes[0]


def test_longer_matches_count_for_more() -> None:
    asked = Asked()
    asked.answer([1, 2, 3, 4, 5, 6, 7, 8], [10, 11])
    for _ in range(5):
        asked.answer([0, 0, 0, 0, 5, 6, 7, 8], [20, 21])
    assert asked.draft(asked.begin([1, 2, 3, 4, 5, 6, 7, 8])).tokens[0] == 10
    assert asked.draft(asked.begin([9, 9, 9, 9, 5, 6, 7, 8])).tokens[0] == 20


WHOSE = st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from([b"", b"x", b"y"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WHOSE, st.integers(0, 3), st.integers(0, 30)), max_size=12))
def test_other_tenants_and_salts_change_nothing(requests: list[tuple[tuple[str, bytes], int, int]]) -> None:
    """Each gets the drafts that it would get if it were alone, token for token and class for class: what the others
    say cannot be seen in its accepted tokens either."""
    shared = Asked()
    alone: dict[tuple[str, bytes], Asked] = {}
    for (tenant, salt), kind, change in requests:
        answer = [*RECORD[:change], 200 + kind, *RECORD[change:]]
        own = alone.setdefault((tenant, salt), Asked())
        wanted = own.answer([kind, 2, 3, 4, 5], answer, tenant=tenant, salt=salt)
        assert shared.answer([kind, 2, 3, 4, 5], answer, tenant=tenant, salt=salt) == wanted


def test_what_may_not_be_drafted_for_is_not_kept() -> None:
    asked = Asked()
    asked.drafter.release(asked.begin(RECORD, drafters=("suffix",)))
    asked.drafter.release(asked.begin(RECORD, drafters=()))
    assert asked.draft(asked.begin(RECORD[:20])) is NO_DRAFT
    asked.drafter.release(asked.begin(RECORD))
    assert asked.draft(asked.begin(RECORD[:20])).tokens[:2] == (77, 30)


def test_a_text_that_is_forgotten_while_it_is_followed() -> None:
    asked = Asked(SMALLEST)
    asked.answer([1, 2, 3, 4, 5], RECORD)
    sequence = asked.begin([1, 2, 3, 4, 5])
    assert asked.draft(sequence).tokens
    for number in range(100):
        asked.answer([number] * 5, list(range(1000, 1100)), tenant="another")
    sequence.tokens += RECORD[:3]
    assert asked.draft(sequence) is NO_DRAFT
    asked.answer([1, 2, 3, 4, 5], RECORD)
    sequence.tokens += RECORD[3:10]
    assert asked.draft(sequence).tokens[0] == RECORD[10]


def test_uses_are_counted_since_the_last_time() -> None:
    asked = Asked()
    assert asked.drafter.take_use() == (0, 0, 0)
    steps, right = asked.answer([1, 2, 3, 4, 5], RECORD)
    nbytes, queries, hits = asked.drafter.take_use()
    assert 0 < nbytes <= asked.drafter.store.nbytes
    assert (queries, hits, right) == (steps - 1, 0, 0)  # the last token is not drafted for
    asked.answer([1, 2, 3, 4, 5], RECORD)
    more, queries, hits = asked.drafter.take_use()
    assert more > nbytes
    assert 0 < hits <= queries
    assert asked.drafter.take_use() == (more, 0, 0)


def test_a_corpus_is_for_everybody_and_stays() -> None:
    asked = Asked()
    asked.drafter.warm([RECORD, list(range(5000, 9000)) * 3])
    assert asked.drafter.corpus is not None
    assert asked.drafter.store.nbytes + asked.drafter.corpus.nbytes <= 1 << 20
    for tenant in ("a", "b"):
        draft = asked.draft(asked.begin(RECORD[:20], tenant=tenant))
        assert draft.tokens[:2] == (77, 30)
        assert min(draft.classes) >= 200
    for number in range(2000):
        asked.drafter.release(asked.begin(range(20_000 + number, 20_100 + number), tenant="c"))
    assert asked.draft(asked.begin(RECORD[:20])).tokens[:2] == (77, 30)
    assert asked.draft(asked.begin(range(8980, 9000))).tokens[:2] == (5000, 5001)
    asked.answer(RECORD[:20], [78, 31, 32], tenant="a")  # one's own past comes first
    assert asked.draft(asked.begin(RECORD[:20], tenant="a")).tokens[0] == 78
    with pytest.raises(ConfigError, match="may take half of suffix_memory"):
        Asked().drafter.warm([list(range(40_000))])


def test_a_corpus_is_read_from_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    assert read_corpus([str(tmp_path / "a.txt")], lambda text: list(map(ord, text))) == [[97, 98]]
    (tmp_path / "b.txt").write_bytes(b"\xff")
    for name in ("b.txt", "c.txt"):
        with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
            read_corpus([str(tmp_path / name)], lambda text: [])
    with pytest.raises(ConfigError, match="suffix_corpus needs suffix_memory"):
        EngineConfig(suffix_corpus=("a.txt",), suffix_memory=0).check()


def test_settings() -> None:
    assert isinstance(make(EngineConfig()), LongDrafter)
    assert make(EngineConfig(suffix_draft_tokens=20)).longest == 20
    with pytest.raises(ConfigError, match="suffix_memory is 0 bytes, but"):
        make(EngineConfig(suffix_memory=0))


def test_a_step_costs_microseconds() -> None:
    """Bounds are some ten times what is seen on a slow machine; a step of the smallest model takes 3 ms."""
    rng = random.Random(3)
    asked = Asked(1 << 24)
    words = [int(rng.paretovariate(0.8)) % 40_000 for _ in range(400)]
    records = [[word if rng.random() < 0.9 else rng.randrange(40_000) for word in words] for _ in range(300)]
    for record in records:
        asked.drafter.release(asked.begin(record))
    sequences = [asked.begin(record[:100]) for record in records[:8]]
    times = []
    for step in range(100, 160):
        for sequence, record in zip(sequences, records, strict=False):
            sequence.tokens.append(record[step] if rng.random() < 0.9 else 7)
        start = time.process_time()
        asked.drafter.propose([DraftRequest(sequence, 32) for sequence in sequences])
        times.append((time.process_time() - start) / len(sequences))
    assert sorted(times)[len(times) // 2] < 500e-6
