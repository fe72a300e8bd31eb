"""Incremental detokenization: the growing text of an answer, stop strings, and log-probabilities held back until their
text is shown. The work for a token does not depend on the length of the answer.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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


_FIRST_MARK, _MOST_MARKS = 0xD800, 0x800
"""Marks are surrogates, which UTF-8 cannot encode."""


class Vocabulary:
    """The bytes of each token, cached."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        special = self._special = tokenizer.special_ids
        spellings = [(id_, tokenizer.token_bytes(id_).decode("utf-8", "replace")) for id_ in sorted(special)]
        self._spellings = [(id_, spelling) for id_, spelling in spellings if spelling]
        self.bytes_of: Callable[[int], bytes] = cache(tokenizer.token_bytes)
        """Returns the bytes of a token, including special tokens."""
        self.text_bytes_of: Callable[[int], bytes] = cache(
            lambda id_: b"" if id_ in special else tokenizer.token_bytes(id_)
        )
        """Returns the bytes of a token; b"" for special tokens."""

    def showing(self, shown: frozenset[int]) -> Callable[[int], bytes]:
        """Return what returns the bytes of a token; b"" for special tokens that are not in `shown`."""
        if not shown:
            return self.text_bytes_of
        return lambda id_: self.bytes_of(id_) if id_ in shown else self.text_bytes_of(id_)

    def is_special(self, id_: int) -> bool:
        return id_ in self._special

    def marks(self, stops: Sequence[str]) -> dict[int, str]:
        """Return a mark for each special token that a stop string spells: a character that no text has, for a text from
        which special tokens are left out. See `StopStrings`."""
        if not stops:
            return {}
        together = "\0".join(stops)
        found = [id_ for id_, spelling in self._spellings if spelling in together]
        return {id_: chr(_FIRST_MARK + i) for i, id_ in enumerate(found[:_MOST_MARKS])}


class Detokenizer:
    """Decodes token ids incrementally, to the same text as all of them at once.

    Bytes of an incomplete character are held back. Invalid bytes become U+FFFD by WHATWG's "maximal subpart"
    replacement, as in Python and the tokenizers library.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        skip_special_tokens: bool = True,
        marks: Mapping[int, str] | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`marks` (of `Vocabulary.marks`) are put where these special tokens were left out; those in `shown` are
        spelled out all the same."""
        self._bytes_of = vocabulary.showing(shown) if skip_special_tokens else vocabulary.bytes_of
        self._marks = marks or {}
        self._held = b""

    def feed(self, ids: Iterable[int]) -> str:
        """Add ids and return the characters that they complete."""
        if self._marks:
            marks = self._marks
            return "".join([marks.get(id_) or self._decode(self._bytes_of(id_), False) for id_ in ids])
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

    `marks`, by the spelling of the special tokens that they stand for, may be in the text. A stop string that spells
    such tokens is found with the marks, too, and none is shown.
    """

    def __init__(self, stops: Sequence[str], include: bool = False, marks: Mapping[str, str] | None = None) -> None:
        spelled = dict.fromkeys(stops)
        self._whole = {stop: stop for stop in spelled}
        """The stop strings as the client has them, by what is looked for."""
        if marks:
            longest_first = sorted(marks, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, longest_first)))
            self._whole |= {pattern.sub(lambda match: marks[match[0]], stop): stop for stop in spelled}
        self._stops = tuple(self._whole)
        self._hidden = dict.fromkeys(map(ord, (marks or {}).values()))
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that was found, as the client has it."""

    def visible(self, text: str) -> str:
        """Return the text without marks."""
        return text.translate(self._hidden) if self._hidden else text

    def feed(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """Add text. Returns the text that may be shown, and whether a stop string ends it. Unless `armed`, stop strings
        that `text` completes are ignored, now and later."""
        if not self._stops:
            return text, False
        window = self._held + text
        if armed:
            # Stop strings completed by earlier parts were ignored: a match must end in the new part.
            found = [
                (at, len(stop), stop)
                for stop in self._stops
                if (at := window.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if found:
                at, _, stop = min(found)
                self._held, self.found = "", self._whole[stop]
                return self.visible(window[:at]) + (self._whole[stop] if self._include else ""), True
        shown = len(window) - max(_overlap(window, stop) for stop in self._stops)
        self._held = window[shown:]
        return self.visible(window[:shown]), False

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return self.visible(held)


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
    """A token with its log-probability and its origin."""

    token_id: int
    offset: int
    """Number of characters of text before it."""
    logprobs: TokenLogprobs | None
    """None if they are not wanted, and for the first token of a prompt, which has no prediction."""
    origin: object = None
    """What the caller knows about where it came from, passed through unread."""


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
    `min_tokens` tokens. `tokens` counts up to and including the token that completed a stop string. `marks`: those of
    the detokenizer, by the spelling of their tokens.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        offset: int = 0,
        marks: Mapping[str, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include_stop, marks)
        self._plain = not stops
        self._min_tokens = min_tokens
        self._decoded = offset
        self._shown = offset
        self._waiting: deque[TokenEntry] = deque()
        self.tokens = 0
        self.stopped = False
        """Whether a stop string has ended the text."""

    def start(self, id_: int) -> int:
        """Return the number of characters before a next token `id_`, those included that may become a stop string."""
        return self._decoded + self._detokenizer.breaks(id_)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has ended the text, or None."""
        return self._stops.found

    def feed(
        self,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        *,
        origins: Sequence[object] | None = None,
        last: bool = False,
        stop_token: bool = False,
    ) -> Piece:
        """Add tokens, with entries if there are `logprobs` or `origins`, one for each. With `last`, nothing follows;
        with `stop_token`, the last of `ids` counts, but adds no text."""
        spelled = ids[:-1] if stop_token else ids
        if self._plain and logprobs is None and origins is None:
            self.tokens += len(ids)
            text = self._detokenizer.feed(spelled)
            text = (text + self._detokenizer.finish()) if last else text
            self._decoded += len(text)
            return Piece(text)
        text = ""
        for i, id_ in enumerate(spelled):
            if logprobs is not None or origins is not None:
                offset = self._decoded + self._detokenizer.breaks(id_)
                own = None if logprobs is None else logprobs[i]
                self._waiting.append(TokenEntry(id_, offset, own, None if origins is None else origins[i]))
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
        self._decoded += len(self._stops.visible(text))
        shown, self.stopped = self._stops.feed(text, armed=self.tokens > self._min_tokens)
        return shown

    def _ripe(self, all_of_them: bool) -> list[TokenEntry]:
        """Return the entries of tokens whose text has begun to be shown: others could reveal a stop string."""
        entries = []
        while self._waiting and (all_of_them or self._waiting[0].offset < self._shown):
            entries.append(self._waiting.popleft())
        return entries
