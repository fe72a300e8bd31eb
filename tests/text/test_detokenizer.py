"""Incremental text of answers, compared with all ids decoded at once, and stop strings searched in the whole text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.request import TokenLogprobs
from pilotfish.text.detokenizer import AnswerText, Detokenizer, TokenEntry, Vocabulary
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(ModelFiles("tiny", "huggingface", tiny_llama))


class Alphabet:
    """A tokenizer of few characters, so that stop strings and split characters come up all the time."""

    spelled = (b"a", b"b", b"ab", b"ba", b"aab", "é".encode()[:1], "é".encode()[1:], "é".encode(), b"", b"<s>")
    special_ids = frozenset({9})

    def token_bytes(self, id: int) -> bytes:
        return self.spelled[id]


VOCABULARY = Vocabulary(Alphabet())
SPECIAL = "<s>"
SPELLED = st.lists(st.sampled_from(["a", "b", SPECIAL]), min_size=1, max_size=3).map("".join)
IDS = st.lists(st.integers(0, len(Alphabet.spelled) - 1), max_size=30)
STOPS = st.lists(st.text("abé\ufffd", min_size=1, max_size=5), min_size=1, max_size=4)


def portions(ids: list[int], cuts: Callable[[int], bool]) -> Iterator[tuple[list[int], bool]]:
    """`ids` in the portions that `cuts` makes, and whether each is the last."""
    start = 0
    for i in range(1, len(ids)):
        if cuts(i):
            yield ids[start:i], False
            start = i
    yield ids[start:], True


@given(ids=st.lists(st.integers(0, 511), max_size=60), skip=st.booleans(), data=st.data())
def test_any_ids_in_any_portions_give_the_text_of_all_at_once(
    tokenizer: Tokenizer, ids: list[int], skip: bool, data: st.DataObject
) -> None:
    detokenizer = Detokenizer(Vocabulary(tokenizer), skip_special_tokens=skip)
    parts = [detokenizer.feed(portion) for portion, _ in portions(ids, lambda i: data.draw(st.booleans()))]
    assert "".join(parts) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
def test_text_comes_out_as_it_went_in_without_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(Vocabulary(tokenizer), skip_special_tokens=False)
    shown = ""
    for id_ in tokenizer.encode(text, add_special_tokens=False):
        shown += detokenizer.feed((id_,))
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


def expected(ids: list[int], stops: list[str], include: bool, min_tokens: int) -> tuple[str, int, bool]:
    """Text, tokens and whether a stop string ended it: by looking at the whole text after each token."""
    detokenizer = Detokenizer(VOCABULARY)
    text, parts = "", [detokenizer.feed((id_,)) for id_ in ids]
    for count, part in enumerate([*parts, detokenizer.finish()], start=1):
        before, text = len(text), text + part
        if min(count, len(ids)) <= min_tokens:
            continue
        found = [
            (at, at + len(stop))
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        ]
        if found:
            start, end = min(found)
            return text[: end if include else start], min(count, len(ids)), True
    return text, len(ids), False


def could_go_on(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


@given(ids=IDS, stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 6), data=st.data())
def test_a_stop_string_cuts_the_same_place_for_any_portions(
    ids: list[int], stops: list[str], include: bool, min_tokens: int, data: st.DataObject
) -> None:
    want, tokens, stopped = expected(ids, stops, include, min_tokens)
    answer = AnswerText(Detokenizer(VOCABULARY), stops, include_stop=include, min_tokens=min_tokens)
    shown = ""
    for portion, last in portions(ids, lambda i: data.draw(st.booleans())):
        shown += answer.feed(portion, last=last).text
        assert want.startswith(shown)  # nothing of a stop string is ever shown
        if answer.stopped:
            break
    assert (shown, answer.tokens, answer.stopped) == (want, tokens, stopped)


@given(ids=IDS, stops=STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(ids: list[int], stops: list[str]) -> None:
    answer, detokenizer = AnswerText(Detokenizer(VOCABULARY), stops), Detokenizer(VOCABULARY)
    shown = decoded = ""
    for id_ in ids:
        shown += answer.feed((id_,)).text
        decoded += detokenizer.feed((id_,))
        if answer.stopped:
            return
        assert shown == decoded[: len(decoded) - could_go_on(decoded, stops)]


@given(ids=IDS, stops=STOPS | st.just([]), offset=st.integers(0, 3), data=st.data())
def test_logprobs_come_with_their_text_and_never_before_it(
    ids: list[int], stops: list[str], offset: int, data: st.DataObject
) -> None:
    want, _, stopped = expected(ids, stops, False, 0)
    answer = AnswerText(Detokenizer(VOCABULARY), stops, offset=offset)
    logprobs = [TokenLogprobs(id_, -float(i)) for i, id_ in enumerate(ids)]
    shown, entries, done = "", list[TokenEntry](), 0
    for portion, last in portions(ids, lambda i: data.draw(st.booleans())):
        piece = answer.feed(portion, logprobs[done : done + len(portion)], last=last)
        done += len(portion)
        shown += piece.text
        entries += piece.entries
        if not last:
            assert all(entry.offset < offset + len(shown) for entry in piece.entries)
        if answer.stopped:
            break
    assert shown == want
    assert [entry.logprobs for entry in entries] == logprobs[: len(entries)]
    if not stopped:
        assert len(entries) == len(ids)
    spelled = [VOCABULARY.text_bytes_of(id_) for id_ in ids]
    for i, entry in enumerate(entries):
        before, after = b"".join(spelled[:i]).decode(errors="replace"), b"".join(spelled[i:]).decode(errors="replace")
        within = len(before) + len(after) > len(b"".join(spelled).decode(errors="replace"))  # a character
        if spelled[i]:
            assert entry.offset == offset + len(before) - within


@pytest.mark.parametrize("logprobs", [None, [TokenLogprobs(0, -0.5), TokenLogprobs(1, -0.5), TokenLogprobs(9, -0.1)]])
def test_a_stop_token_counts_but_is_no_text(logprobs: list[TokenLogprobs] | None) -> None:
    answer = AnswerText(Detokenizer(VOCABULARY, skip_special_tokens=False))
    piece = answer.feed([0, 1, 9], logprobs, last=True, stop_token=True)
    assert (piece.text, answer.tokens, answer.stopped) == ("ab", 3, False)
    assert [entry.token_id for entry in piece.entries] == ([] if logprobs is None else [0, 1])


@given(
    ids=IDS,
    stops=st.lists(
        st.lists(st.sampled_from(["a", "b", SPECIAL]), min_size=1, max_size=3).map("".join), min_size=1, max_size=3
    ),
    include=st.booleans(),
    data=st.data(),
)
def test_a_stop_string_may_spell_special_tokens_that_are_left_out(
    ids: list[int], stops: list[str], include: bool, data: st.DataObject
) -> None:
    """The text with special tokens in it is searched, token by token; shown is what is before, without them."""
    marks = VOCABULARY.marks(stops)
    detokenizer = Detokenizer(VOCABULARY, marks=marks)
    text = AnswerText(
        detokenizer, stops, include_stop=include, marks=dict(zip([SPECIAL], marks.values(), strict=False))
    )
    shown = ""
    for portion, last in portions(ids, lambda i: data.draw(st.booleans())):
        shown += text.feed(portion, last=last).text
        if text.stopped:
            break
    plain, whole, wanted = Detokenizer(VOCABULARY), "", None
    pieces = [SPECIAL if id_ == 9 and any(SPECIAL in stop for stop in stops) else plain.feed((id_,)) for id_ in ids]
    pieces.append(plain.finish())
    for piece in pieces:
        whole += piece
        ends = [(whole.find(stop), len(stop), stop) for stop in stops if stop in whole]
        if ends:
            at, _, stop = min(ends)
            wanted = whole[:at].replace(SPECIAL, "") + (stop if include else "")
            break
    assert text.stopped == (wanted is not None)
    assert shown == (whole.replace(SPECIAL, "") if wanted is None else wanted)


def test_only_special_tokens_that_stop_strings_spell_are_marked() -> None:
    assert VOCABULARY.marks(["a", "s>"]) == {}
    assert list(VOCABULARY.marks(["x<s>y"])) == [9]
