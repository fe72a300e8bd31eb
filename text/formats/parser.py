"""AnswerParser: finds reasoning, content and calls in the text of an answer as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pilotfish.text.formats.calls import CallReader
from pilotfish.text.message import OPEN, CallBegin, ContentText, Part, ReasoningText

Openers = Sequence[tuple[str, Callable[[], CallReader]]]
"""Markers that open calls, each with what makes the reader of the text behind it."""


class PlainParser:
    """The parser of answers that are nothing but content."""

    thinking = False
    thoughts: Sequence[tuple[int, int]] = ()

    def feed(self, text: str) -> Sequence[Part]:
        return (ContentText(text),) if text else ()

    def finish(self) -> Sequence[Part]:
        return ()


class AnswerParser:
    """A message of optional reasoning, then content and calls.

    Markers are not shown, nor is white space next to them; text that may still become a marker is held back.
    `reasoning`: the markers that open and close it, of which several pairs may be known; `in_reasoning`: whether the
    prompt has opened it. `openers` may stand anywhere in the content, `starters` only at its beginning, and are
    themselves the first text of the reader.
    """

    def __init__(
        self,
        reasoning: Sequence[tuple[str, str]] = (),
        in_reasoning: bool = False,
        openers: Openers = (),
        starters: Openers = (),
    ) -> None:
        self._openers, self._starters = openers, starters
        self._pairs = list(reasoning)
        self._close = [end for _, end in reasoning] if in_reasoning else []
        """What closes the reasoning that is being read; empty outside of it."""
        self._thinking = in_reasoning
        self._reopens = [begin for begin, _ in reasoning if begin] if in_reasoning else []
        """Markers that some models write once more at the beginning of reasoning which the prompt has opened."""
        self._may_think = bool(reasoning) and not in_reasoning
        self._reader: CallReader | None = None
        self._window = ""
        """Text that is held back."""
        self._fresh = True
        """Whether nothing but white space was read of the present section."""
        self._started = False
        """Whether content or a call has begun."""
        self._called = False
        self._opener = ""
        """The marker that has opened the reader, with the white space before it, until something was read as a call: of
        what turns out to be none, it is content."""
        self._fed = 0
        """Characters that the reader was given."""
        self._length = 0
        """Characters of text so far; the window is the last of them."""
        self.thoughts: list[tuple[int, int]] = [(0, OPEN)] if in_reasoning else []

    @property
    def thinking(self) -> bool:
        return self._thinking or (self._may_think and not self._started)

    def feed(self, text: str) -> Sequence[Part]:
        parts: list[Part] = []
        self._window += text
        self._length += len(text)
        while self._advance(parts):
            pass
        return joined(parts)

    def finish(self) -> Sequence[Part]:
        parts: list[Part] = []
        if self._reader is not None:
            self._note(self._reader.finish(), parts)
        window, self._window = self._window, ""
        if self._thinking:
            if window.rstrip():
                parts.append(ReasoningText(window.rstrip()))
        elif window := window.strip() if self._called else window:
            parts.append(ContentText(window))
        return joined(parts)

    def _advance(self, parts: list[Part]) -> bool:
        """Read on in the window; return whether there may be more to read."""
        if self._reader is not None:
            text, self._window = self._window, ""
            found, rest = self._reader.feed(text) if text else ([], None)
            self._fed += len(text)
            self._note(found, parts)
            if rest is None:
                return False
            if self._opener and len(rest) == self._fed:  # the reader took nothing
                parts.append(ContentText(self._opener))
            self._reader, self._window, self._fresh = None, rest, True
            return bool(rest)
        return self._think(parts) if self._thinking else self._read(parts)

    def _note(self, found: Sequence[Part], parts: list[Part]) -> None:
        self._called |= any(isinstance(part, CallBegin) for part in found)
        if found:
            if self._opener and isinstance(found[0], ContentText):
                parts.append(ContentText(self._opener))
            self._opener = ""
        parts += found

    def _think(self, parts: list[Part]) -> bool:
        window = self._window.lstrip() if self._fresh else self._window
        if self._fresh and self._reopens:
            if any(begin != window and begin.startswith(window) for begin in self._reopens):
                return False
            reopened = next((begin for begin in self._reopens if window.startswith(begin)), "")
            window, self._reopens = window.removeprefix(reopened), []
            if reopened:
                self.thoughts = [(self._length - len(window), OPEN)]
            window = window.lstrip()
        at, marker = first_of(window, self._close)
        shown = window[:at] if marker else window[: len(window) - held(window, self._close)]
        shown, rest = shown.rstrip(), window
        if shown:
            parts.append(ReasoningText(shown))
            self._fresh = False
            rest = window[len(shown) :]
        self._window = rest
        if not marker:
            return False
        self.thoughts = [(self.thoughts[0][0], self._length - len(window) + at)]
        self._thinking, self._fresh, self._window = False, True, window[at + len(marker) :]
        return True

    def _read(self, parts: list[Part]) -> bool:
        window = self._window
        if self._fresh and not self._started:
            stripped = window.lstrip()
            if not stripped:
                return False
            begins = [begin for begin, _ in self._pairs] if self._may_think else []
            starts = [start for start, _ in self._starters]
            marker = next((each for each in (*begins, *starts) if each and stripped.startswith(each)), None)
            if marker is None and any(each.startswith(stripped) for each in (*begins, *starts)):
                return False
            if marker in begins:
                self._close = [end for begin, end in self._pairs if begin == marker]
                self._thinking, self._may_think, self._window = True, False, stripped[len(marker or "") :]
                self.thoughts = [(self._length - len(self._window), OPEN)]
                return True
            if marker is not None:
                self._reader = next(make for start, make in self._starters if start == marker)()
                self._started, self._window, self._opener = True, stripped, ""
                return True
            after_thought = bool(self._pairs) and not self._may_think
            self._window = window = stripped if after_thought else window
        openers = [marker for marker, _ in self._openers]
        at, marker = first_of(window, openers)
        if marker:
            content = window[:at].strip() if self._called else window[:at].rstrip()
            if content:
                parts.append(ContentText(content))
            self._reader = next(make for each, make in self._openers if each == marker)()
            self._window, self._started, self._fresh = window[at + len(marker) :], True, True
            self._opener, self._fed = ("" if self._called else window[len(content) : at]) + marker, 0
            return bool(self._window)
        shown = window[: len(window) - held(window, openers)]
        if openers:
            shown = shown.rstrip()  # white space before a call is not shown
        if shown.strip() or (shown and not self._called):
            parts.append(ContentText(shown.lstrip() if self._called else shown))
            self._window, self._fresh, self._started, self._called = window[len(shown) :], False, True, False
        return False


def first_of(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Return where the first of the markers begins, and which it is; the longer one of two. "" for none."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    at, _, marker = min(found, default=(len(text), 0, ""))
    return at, marker


def held(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that may become one of the markers."""
    most = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), most, -1):
            if marker.startswith(text[-length:]):
                most = length
                break
    return most


def joined(parts: list[Part]) -> list[Part]:
    """Return the parts, neighbours of a kind joined."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, ContentText) and isinstance(last, ContentText):
            found[-1] = ContentText(last.text + part.text)
        elif isinstance(part, ReasoningText) and isinstance(last, ReasoningText):
            found[-1] = ReasoningText(last.text + part.text)
        else:
            found.append(part)
    return found
