"""NgramDrafter: prompt lookup decoding, which drafts what followed the last few tokens where they occurred before.

The idea is Apoorv Saxena's prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), also known as n-gram
speculation. Here the text is indexed as it arrives, so that no draft ever scans it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.errors import ConfigError


class NgramDrafter:
    """Looks up the last `ngram_max` tokens, then fewer, down to `ngram_min`, and drafts what followed them.

    Of several occurrences the most recent counts, since texts repeat what came last: a list's format, a loop, a name.
    A longer match is stronger evidence and gets a longer draft, 2n + 1 tokens for a match of n.
    Time and memory are proportional to the tokens times the number of lengths. Raises ConfigError unless
    1 <= ngram_min <= ngram_max.
    """

    name = "ngram"

    def __init__(self, ngram_max: int, ngram_min: int) -> None:
        if not 1 <= ngram_min <= ngram_max:
            raise ConfigError(f"ngram_min is {ngram_min}, but must be between 1 and ngram_max ({ngram_max})")
        self._lengths = range(ngram_max, ngram_min - 1, -1)
        self._indices: dict[str, _Index] = {}

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty if no suffix occurs earlier in the text."""
        return [self._draft(request.sequence, request.limit) for request in requests]

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's index."""
        self._indices.pop(sequence.id, None)

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        tokens = sequence.tokens
        index = self._indices.get(sequence.id)
        if index is None:
            index = self._indices[sequence.id] = _Index([{} for _ in self._lengths])
        self._catch_up(index, tokens)
        for length, followers in zip(self._lengths, index.followers, strict=True):
            start = followers.get(tuple(tokens[-length:]))
            if start is not None:
                return Draft(_copy(tokens, start, min(limit, 2 * length + 1)), None, self.name, length)
        return NO_DRAFT

    def _catch_up(self, index: _Index, tokens: list[int]) -> None:
        end = len(tokens)
        if index.end == end:
            return
        for length, followers in zip(self._lengths, index.followers, strict=True):
            # An n-gram is entered once a token follows it: the text's own suffix must not find itself.
            first = max(index.end, length)
            recent = tokens[first - length : end - 1]
            # zip and dict.update loop in C, which matters for long prompts; a later occurrence replaces an earlier one.
            grams = zip(*(recent[i:] for i in range(length)), strict=False)
            followers.update(zip(grams, range(first, end), strict=False))
        index.end = end


def make(config: EngineConfig) -> NgramDrafter:
    return NgramDrafter(config.ngram_max, config.ngram_min)


@dataclass(slots=True)
class _Index:
    followers: list[dict[tuple[int, ...], int]]
    """For each length, longest first: the position after an n-gram's most recent occurrence that a token follows."""
    end: int = 0
    """Number of tokens that are indexed."""


def _copy(tokens: list[int], start: int, count: int) -> tuple[int, ...]:
    """Return `count` tokens from `start` on, as if they were appended while copying (LZ77's overlapping copy): a text
    of period p is continued with period p."""
    copied = tokens[start : start + count]
    period = len(tokens) - start
    if count > period:
        copied = (copied * -(-count // period))[:count]
    return tuple(copied)
