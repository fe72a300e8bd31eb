"""AnswerGrammar: what an answer may be, followed token by token: its grammar, and the budget of its reasoning.

It is advanced where tokens are committed, and looks ahead along drafts without keeping them. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor

from pilotfish.engine.params import Thinking
from pilotfish.text.grammar.matcher import EVERYTHING, Matcher, compute_masks

MOST_FURTHER_BYTES = 3
"""Bytes of a character behind its first one."""
LATEST = 8
"""Tokens of an answer, such as white space, within which its reasoning may begin."""


class _Thought(NamedTuple):
    """How far an answer's reasoning has come."""

    open: bool
    tokens: int = 0
    """Tokens of reasoning so far, less those that close it."""
    matched: int = 0
    """Tokens just before that are the beginning of the marker which opens reasoning, or which closes it."""
    closing: bool = False
    """Whether the marker is being forced."""
    over: bool = False
    spent: int | None = None
    """Tokens of reasoning that was closed, where more may follow."""


class AnswerGrammar:
    """The place of one answer in its grammar and in its reasoning; either may be None."""

    def __init__(self, matcher: Matcher | None, thinking: Thinking | None, vocab_size: int) -> None:
        self.matcher = matcher
        self._thinking = thinking
        self._words = -(-vocab_size // 32)
        self._thought = _Thought(open=thinking is not None and not thinking.begin, over=thinking is None)
        self._planned: tuple[tuple[int, ...], np.ndarray] | None = None
        self._forced: list[int] | None = None

    def advance(self, tokens: Sequence[int]) -> None:
        """Follow committed tokens."""
        if self.matcher is not None:
            self.matcher.advance(tokens)
        for token in tokens:
            self._thought = self._think(self._thought, token)
        self._planned = None
        known, count = self._forced, len(tokens)
        goes_on = known is not None and len(known) > count and known[:count] == list(tokens)
        self._forced = known[count:] if known is not None and goes_on else None  # else every step would look for it

    def masks(self, draft: Sequence[int], rows: int) -> np.ndarray:
        """Return what may be drawn in the last `rows` rows along `draft`: (rows, words) int32, bit i of word w for
        token 32 w + i."""
        along = tuple(draft)
        if self.matcher is None:
            found = np.full((rows, self._words), EVERYTHING, dtype=np.int32)
        elif self._planned is not None and self._planned[0] == along:
            found = self._planned[1][-rows:]
        else:
            found = self.matcher.masks(along, rows)
        if not self._thought.over:
            self._close_thoughts(found, along)
        return found

    def count_allowed(self, draft: Sequence[int]) -> int:
        """Return how many tokens of a draft may come next, one after the other."""
        count = len(draft) if self.matcher is None else self.matcher.count_allowed(draft)
        thought = self._thought
        for i, token in enumerate(draft[:count] if not thought.over else ()):
            wanted = self._must_close(thought)
            if (wanted is not None and token != wanted) or (self._must_finish(thought) and self._unfinished(token)):
                return i
            thought = self._think(thought, token)
        return count

    def forced(self, limit: int) -> list[int]:
        """Return at most `limit` tokens that must come next, as far as they are known."""
        if self._forced is None:
            self._forced = self._find_forced()
        return self._forced[:limit]

    def _find_forced(self) -> list[int]:
        tokens: list[int] = []
        thought = self._thought
        while not thought.over and (token := self._must_close(thought)) is not None:
            tokens.append(token)
            thought = self._think(thought, token)
        if self.matcher is None:
            return tokens
        if tokens:
            return tokens if self.matcher.count_allowed(tokens) == len(tokens) else []
        return self.matcher.forced()

    @property
    def problem(self) -> str:
        """Why the answer cannot go on; empty as long as it can."""
        return "" if self.matcher is None else self.matcher.problem

    def _must_close(self, thought: _Thought) -> int | None:
        """Return the token that must come next to close reasoning whose budget is used up, or None."""
        thinking = self._thinking
        if thinking is None or not thought.open or thought.over:
            return None
        if not thought.closing and thought.tokens < thinking.budget:
            return None
        return thinking.end[thought.matched if thought.closing else 0]

    def _must_finish(self, thought: _Thought) -> bool:
        """Whether reasoning must soon be closed, and may not begin a character that could still be open then: under a
        grammar, which is of whole characters, the marker would have to wait for its end."""
        thinking = self._thinking
        if thinking is None or self.matcher is None or not thought.open or thought.over or thought.closing:
            return False
        return thought.tokens >= thinking.budget - MOST_FURTHER_BYTES

    def _unfinished(self, token: int) -> bool:
        assert self.matcher is not None
        return bool(self.matcher.unfinished[token >> 5] >> (token & 31) & 1)

    def _think(self, thought: _Thought, token: int) -> _Thought:
        """Return the state of the reasoning after one more token."""
        thinking = self._thinking
        if thinking is None or thought.over:
            return thought
        if not thought.open:
            begin = thinking.begin if thought.spent is None else thinking.again
            matched = _matched(begin, thought.matched, token)
            if matched == len(begin):
                return _Thought(True, thought.spent or 0)
            if thought.spent is not None:
                return thought._replace(matched=matched)
            # What begins with something else has no reasoning, or opens it in its first tokens.
            over = thought.tokens >= LATEST and not matched
            return _Thought(False, thought.tokens + 1, matched, over=over)
        matched, closing = _matched(thinking.end, thought.matched, token), False
        if token == self._must_close(thought):
            matched, closing = (thought.matched if thought.closing else 0) + 1, True
        if matched == len(thinking.end):
            spent = max(0, thought.tokens + 1 - matched)
            return _Thought(False, spent=spent) if thinking.again else _Thought(False, thought.tokens + 1, over=True)
        return _Thought(True, thought.tokens + 1, matched, closing)

    def _close_thoughts(self, masks: np.ndarray, draft: Sequence[int]) -> None:
        """Leave only the marker's next token in the rows in which reasoning must be closed, and none in those before
        that would begin a character and not end it. A row that does not allow the marker waits for the next one."""
        thought, skipped = self._thought, len(draft) + 1 - len(masks)
        for row in range(-skipped, len(masks)):
            token = self._must_close(thought)
            if token is not None and row >= 0:
                word, bit = divmod(token, 32)
                only = masks[row, word] & np.uint32(1 << bit).astype(np.int32)
                if only:
                    masks[row] = 0
                    masks[row, word] = only
            elif row >= 0 and self.matcher is not None and self._must_finish(thought):
                masks[row] &= ~self.matcher.unfinished
            if row + skipped < len(draft):
                thought = self._think(thought, draft[row + skipped])


def plan_masks(asked: Sequence[tuple[AnswerGrammar, tuple[int, ...]]], executor: LLExecutor) -> None:
    """Compute the masks of several answers along their drafts at once, for their `masks`; each must have a matcher."""
    found = compute_masks([(one.matcher, draft) for one, draft in asked if one.matcher is not None], executor)
    for (one, draft), masks in zip(asked, found, strict=True):
        one._planned = draft, masks


def _matched(marker: Sequence[int], matched: int, token: int) -> int:
    """Return how many tokens of `marker` the text ends with, after `matched` of them and one more token."""
    text = (*marker[:matched], token)
    for length in range(min(len(marker), len(text)), 0, -1):
        if text[-length:] == tuple(marker[:length]):
            return length
    return 0
