"""Matchers follow answers through compiled grammars: which tokens may come next, which must. llguidance does the work,
in Rust and without the GIL.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.errors import ModelError, ParameterError
from pilotfish.text.conversion import tokenizer_folder
from pilotfish.text.grammar.compiling import LIMITS
from pilotfish.text.grammar.grammar import Grammar

KEPT = 64
"""Compiled grammars that are kept for further requests."""
MOST_THREADS = 8
"""Threads that compute masks: each takes tens of microseconds."""
MOST_FORCED = 2048
"""Tokens that are forced in a row, of which no more are looked for: finding tens of thousands takes half a second."""
_UNFINISHED = re.compile(rb"(?:[\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z")
"""A first byte of UTF-8, with fewer bytes behind it than it announces."""
EVERYTHING = -1
"""The word of a mask that allows all of its 32 tokens."""


@dataclass(slots=True)
class CompiledGrammar:
    """A compiled grammar, at the beginning of an answer."""

    start: LLMatcher
    forces_much: bool = False
    """Somewhere it forces so many tokens that it is not asked any more which."""

    def forced(self, place: LLMatcher) -> tuple[list[int], LLMatcher]:
        """Return the tokens that must come next at a place in an answer, and the place after them."""
        ahead = place.deep_copy()  # in a microsecond; the limits that it runs into are its own
        tokens: list[int] = ahead.compute_ff_tokens()
        self.forces_much = self.forces_much or len(tokens) > MOST_FORCED or ahead.is_error()
        return ([] if ahead.is_error() else tokens[:MOST_FORCED]), ahead


class Matcher:
    """The place of one answer in a grammar. Tokens are consumed, and can be taken back."""

    def __init__(self, compiled: CompiledGrammar, vocabulary: LLTokenizer, unfinished: np.ndarray) -> None:
        self._compiled = compiled
        self._inner = compiled.start.deep_copy()
        self.unfinished = unfinished
        """The tokens that end within a character which they begin, as a mask: (words,) int32."""
        self._ends = frozenset(vocabulary.eos_tokens)
        self.words = -(-vocabulary.vocab_size // 32)
        """Number of words of a mask."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Consume tokens of the answer; one that ends it counts for nothing."""
        text = [token for token in tokens if token not in self._ends]
        self._inner.consume_tokens(text)

    def roll_back(self, count: int) -> None:
        """Take the last `count` tokens back."""
        self._inner.rollback(count)

    def masks(self, draft: Sequence[int], rows: int) -> np.ndarray:
        """Return the last `rows` of the masks along `draft`; see `compute_masks`."""
        found = np.full((rows, self.words), EVERYTHING, dtype=np.int32)
        self._fill(found, draft)
        return found

    def _fill(self, rows: np.ndarray, draft: Sequence[int]) -> None:
        """Write the last masks along `draft` into `rows`."""
        inner, consumed, skipped = self._inner, 0, len(draft) + 1 - len(rows)
        for row in range(len(draft) + 1):
            if row >= skipped:
                inner.unsafe_compute_mask_ptr(rows[row - skipped].ctypes.data, self.words * 4)
            if row == len(draft) or draft[row] in self._ends or not inner.try_consume_tokens([draft[row]]):
                break
            consumed += 1
        inner.rollback(consumed)

    def count_allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` may come next, one after the other; nothing may follow one that ends the
        answer."""
        inner = self._inner
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        count: int = inner.validate_tokens(list(tokens[:end])) if end else 0
        if count < end or end == len(tokens):
            return count
        inner.try_consume_tokens(list(tokens[:end]))
        accepting = inner.is_accepting()
        inner.rollback(end)
        return end + accepting

    def forced(self) -> list[int]:
        """Return the tokens that must come next; the last one may end the answer. None of a grammar that has forced
        more than MOST_FORCED in a row."""
        if self._compiled.forces_much:
            return []
        tokens, ahead = self._compiled.forced(self._inner)
        count = ahead.try_consume_tokens(tokens) if tokens else 0
        if count == len(tokens) and self._ends and ahead.is_stopped() and not ahead.is_error():
            tokens = [*tokens, min(self._ends)]
        return tokens

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        accepting: bool = self._inner.is_accepting()
        return accepting

    @property
    def problem(self) -> str:
        """Why the answer cannot go on (a limit of the grammar's compiler); empty as long as it can."""
        return self._inner.get_error() if self._inner.is_error() else ""


def compute_masks(asked: Sequence[tuple[Matcher, Sequence[int]]], executor: LLExecutor | None) -> list[np.ndarray]:
    """Return for each matcher and draft the tokens that may come next, and those after each token of the draft:
    (len(draft) + 1, words) int32, bit i of word w for token 32 w + i.

    Rows behind a token that may not be there, or that ends the answer, allow everything. With an `executor`, matchers
    are asked in parallel; nothing else may use them meanwhile.
    """
    counts = [len(draft) + 1 for _, draft in asked]
    starts = [0, *accumulate(counts)]
    words = asked[0][0].words
    rows = np.full((starts[-1], words), EVERYTHING, dtype=np.int32)
    if executor is not None and len(asked) > 1:
        placed = list(zip(asked, starts, strict=False))
        target = (rows.ctypes.data, words * 4, len(rows))
        if single := [(matcher._inner, start) for (matcher, draft), start in placed if not draft]:
            executor.unsafe_compute_mask_ptr(single, *target)
        if drafted := [(matcher._inner, start, list(draft)) for (matcher, draft), start in placed if draft]:
            executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *target)
    else:
        for (matcher, draft), start in zip(asked, starts, strict=False):
            matcher._fill(rows[start : start + len(draft) + 1], draft)
    return [rows[start : start + count] for start, count in zip(starts, counts, strict=False)]


class Compiler:
    """Compiles grammars in threads of its own, and keeps the last KEPT. `load` returns the vocabulary, and is called by
    the first one."""

    def __init__(self, load: Callable[[], LLTokenizer]) -> None:
        self._load = load
        self._vocabulary: LLTokenizer | None = None
        self._unfinished = np.zeros(0, dtype=np.int32)
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self.executor = LLExecutor(max(1, min(MOST_THREADS, (os.cpu_count() or 2) // 2)))
        """Computes masks of several matchers in parallel."""

    def start(self, grammar: Grammar) -> Matcher | Future[CompiledGrammar]:
        """Return a matcher at the beginning of an answer, or where the grammar is new, a future for `finish`."""
        known = self._kept.get(grammar.source)
        if known is None:
            return self._threads.submit(self._compile, grammar.source)
        self._kept.move_to_end(grammar.source)
        return self._matcher(known)

    def finish(self, grammar: Grammar, compiled: Future[CompiledGrammar]) -> Matcher:
        """Return the matcher of a future that is done. Raises ParameterError for a grammar that does not compile, and
        ModelError without a vocabulary for it."""
        fresh = compiled.result()
        self._kept[grammar.source] = fresh
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._matcher(fresh)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, compiled: CompiledGrammar) -> Matcher:
        assert self._vocabulary is not None
        return Matcher(compiled, self._vocabulary, self._unfinished)

    def _compile(self, source: str) -> CompiledGrammar:
        if self._vocabulary is None:
            vocabulary = self._load()
            self._unfinished, self._vocabulary = unfinished_tokens(vocabulary), vocabulary
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise ParameterError("grammar", f"the grammar cannot be compiled: {matcher.get_error()}")
        compiled = CompiledGrammar(matcher)
        compiled.forced(matcher)  # the first time takes longest
        return compiled


def unfinished_tokens(vocabulary: LLTokenizer) -> np.ndarray:
    """Return the tokens that end within a character which they begin, as a mask: (words,) int32. Takes 30 ms for
    50 000 tokens."""
    bits = np.zeros(-(-vocabulary.vocab_size // 32) * 32, dtype=bool)
    for token in range(vocabulary.vocab_size):
        data: bytes = vocabulary.decode_bytes([token])
        bits[token] = not data.isascii() and _UNFINISHED.search(data) is not None
    return np.packbits(bits, bitorder="little").view(np.int32)


def load_vocabulary(files: ModelFiles, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Load a model's vocabulary for grammars, padded to the `vocab_size` of its logits. `eos_token_ids` end an answer.

    Takes tenths of a second. Raises ModelError for a model without a tokenizer that llguidance can read.
    """
    return vocabulary_of(tokenizer_folder(files), vocab_size, eos_token_ids)


def vocabulary_of(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """As `load_vocabulary`, of the tokenizer.json in a folder."""
    try:
        path = str(folder / "tokenizer.json")
        return LLTokenizer(path, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except Exception as error:  # its errors have no common type
        raise ModelError(f"cannot use the tokenizer in {folder} for grammars: {error}") from error
