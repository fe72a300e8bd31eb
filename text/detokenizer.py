"""Incremental detokenization: the text of an answer as it grows, stop strings, and which tokens' log-probabilities may
be shown yet. The work for a token does not depend on the length of the answer. The tokenizer is in `text.tokenizer`.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol


class TokenBytes(Protocol):
    """The parts of a tokenizer that are needed here."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, id: int, /) -> bytes: ...


class TokenLogprobs(Protocol):
    """The log-probability of a token and of the likeliest ones at its position, as the engine gives them. They are only
    passed on here."""

    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...


class Vocabulary:
    """The bytes of each token, asked of the tokenizer once."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        special = tokenizer.special_ids
        self.bytes_of: Callable[[int], bytes] = cache(tokenizer.token_bytes)
        """The bytes that spell a token, a special one included."""
        self.text_bytes_of: Callable[[int], bytes] = cache(
            lambda id_: b"" if id_ in special else tokenizer.token_bytes(id_)
        )
        """The bytes that a token adds to a text without special tokens: none for a special one."""


class Detokenizer:
    """Turns ids that come one after another into text: the same text as from all of them at once.

    Bytes that are not a whole character yet are held back; bytes that cannot become one turn into U+FFFD by WHATWG's
    "maximal subpart" replacement, as in Python and the tokenizers library.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True) -> None:
        self._bytes_of = vocabulary.text_bytes_of if skip_special_tokens else vocabulary.bytes_of
        self._held = b""

    def feed(self, ids: Iterable[int]) -> str:
        """Add ids and return the characters that they complete."""
        return self._decode(b"".join(map(self._bytes_of, ids)), False)

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        return self._decode(b"", True)

    def breaks(self, id_: int) -> bool:
        """True if `id_` does not continue what is held back, which then becomes a U+FFFD before it."""
        first = self._bytes_of(id_)[:1]
        if not self._held or not first:
            return False
        text, used = codecs.utf_8_decode(self._held + first, "replace", False)
        whole = len(text) == 1 and used == len(self._held) + 1
        return used > 0 and not whole

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._held = data[used:]
        return text


class StopStrings:
    """Finds the first stop string in a text that comes in parts, and holds back what may still become one.

    If one part completes several, the one that begins first counts; among those, the shortest.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """Add text; return the text that may be shown, and whether it ends here. Unless `armed`, a stop string that
        `text` completes does not count, now or later."""
        if not self._stops:
            return text, False
        window = self._held + text
        if armed:
            # A stop string that was complete before did not count: a match must end in the new part.
            found = [
                (at, len(stop))
                for stop in self._stops
                if (at := window.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if found:
                at, length = min(found)
                self._held = ""
                return window[: at + length if self._include else at], True
        shown = len(window) - max(_overlap(window, stop) for stop in self._stops)
        self._held = window[shown:]
        return window[:shown], False

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token whose log-probability was asked for."""

    token_id: int
    offset: int
    """Characters of text before it."""
    logprobs: TokenLogprobs | None
    """None for the first token of a prompt, which nothing predicts."""


@dataclass(slots=True)
class Piece:
    """The text that an answer has grown by, and the entries of the tokens that begin in it."""

    text: str
    entries: Sequence[TokenEntry] = ()
    finish_reason: str | None = None
    """Set in the last piece of an answer: "stop" or "length"."""


class AnswerText:
    """The text of one answer. Its token ids come in any portions, and the text is the same whatever they are.

    `offset` is where the answer's text begins (after an echoed prompt), in characters. Stop strings do not count before
    `min_tokens` tokens are there. `tokens` counts up to and including the one that completed a stop string.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        offset: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include_stop)
        self._plain = not stops
        self._min_tokens = min_tokens
        self._decoded = offset
        self._shown = offset
        self._waiting: deque[TokenEntry] = deque()
        self.tokens = 0
        self.stopped = False
        """True once a stop string has ended it."""

    def feed(
        self,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        *,
        last: bool = False,
        stop_token: bool = False,
    ) -> Piece:
        """Add tokens. `last`: nothing follows; `stop_token`: the last of `ids` counts, but adds no text."""
        spelled = ids[:-1] if stop_token else ids
        if self._plain and logprobs is None:
            self.tokens += len(ids)
            text = self._detokenizer.feed(spelled)
            return Piece((text + self._detokenizer.finish()) if last else text)
        text = ""
        for i, id_ in enumerate(spelled):
            if logprobs is not None:
                offset = self._decoded + self._detokenizer.breaks(id_)
                self._waiting.append(TokenEntry(id_, offset, logprobs[i]))
            self.tokens += 1
            text += self._add(self._detokenizer.feed((id_,)))
            if self.stopped:
                break
        else:
            self.tokens += len(ids) - len(spelled)
            if last:
                text += self._add(self._detokenizer.finish())
                if not self.stopped:
                    text += self._stops.finish()
        self._shown += len(text)
        return Piece(text, self._ripe(all_of_them=last and not self.stopped))

    def _add(self, text: str) -> str:
        self._decoded += len(text)
        shown, self.stopped = self._stops.feed(text, armed=self.tokens > self._min_tokens)
        return shown

    def _ripe(self, all_of_them: bool) -> list[TokenEntry]:
        """The entries of tokens whose text has begun to be shown: others could reveal a stop string."""
        entries = []
        while self._waiting and (all_of_them or self._waiting[0].offset < self._shown):
            entries.append(self._waiting.popleft())
        return entries
