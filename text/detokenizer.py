"""Incremental detokenization: the growing text of an answer, stop strings, and log-probabilities held back until their
text is shown. The work for a token does not depend on the length of the answer.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from pilotfish.text.message import Part


class TokenBytes(Protocol):
    """The parts of a tokenizer that detokenization needs."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, id: int, /) -> bytes: ...


class TokenLogprobs(Protocol):
    """The engine's log-probabilities of a token and of the likeliest ones at its position, passed through unread."""

    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...


class Vocabulary:
    """The bytes of each token, cached."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        special = tokenizer.special_ids
        self.bytes_of: Callable[[int], bytes] = cache(tokenizer.token_bytes)
        """Returns the bytes of a token, including special tokens."""
        self.text_bytes_of: Callable[[int], bytes] = cache(
            lambda id_: b"" if id_ in special else tokenizer.token_bytes(id_)
        )
        """Returns the bytes of a token; b"" for special tokens."""


class Detokenizer:
    """Decodes token ids incrementally, to the same text as all of them at once.

    Bytes of an incomplete character are held back. Invalid bytes become U+FFFD by WHATWG's "maximal subpart"
    replacement, as in Python and the tokenizers library.
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
        """Whether `id_` does not continue the bytes held back, which then become a U+FFFD before it."""
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
    """Finds the first stop string in a text that arrives in parts, holding back text that may still become one.

    If a part completes several stop strings, the one that begins first counts; among those, the shortest.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """Add text. Returns the text that may be shown, and whether a stop string ends it. Unless `armed`, stop strings
        that `text` completes are ignored, now and later."""
        if not self._stops:
            return text, False
        window = self._held + text
        if armed:
            # Stop strings completed by earlier parts were ignored: a match must end in the new part.
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
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token with its log-probability."""

    token_id: int
    offset: int
    """Number of characters of text before it."""
    logprobs: TokenLogprobs | None
    """None for the first token of a prompt, which has no prediction."""


@dataclass(slots=True)
class Piece:
    """An addition to an answer: text, and the entries of the tokens that begin in it."""

    text: str
    entries: Sequence[TokenEntry] = ()
    finish_reason: str | None = None
    """Set in the last piece of an answer: "stop" or "length"."""
    parts: Sequence[Part] = ()
    """What a message parser finds in `text`; empty for answers that are plain text."""


class AnswerText:
    """The text of one answer. It does not depend on the portions in which token ids arrive.

    `offset` is the number of characters before the answer (an echoed prompt). Stop strings are ignored up to
    `min_tokens` tokens. `tokens` counts up to and including the token that completed a stop string.
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
        """Whether a stop string has ended the text."""

    def feed(
        self,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        *,
        last: bool = False,
        stop_token: bool = False,
    ) -> Piece:
        """Add tokens. With `last`, nothing follows; with `stop_token`, the last of `ids` counts, but adds no text."""
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
        """Return the entries of tokens whose text has begun to be shown: others could reveal a stop string."""
        entries = []
        while self._waiting and (all_of_them or self._waiting[0].offset < self._shown):
            entries.append(self._waiting.popleft())
        return entries
