"""The reader of calls in a section, each between markers: DeepSeek's and Kimi's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pilotfish.text.formats.calls import MAX_NAME, Calls
from pilotfish.text.formats.scanner import ObjectScanner
from pilotfish.text.message import ContentText, Part


@dataclass(slots=True)
class SectionCalls:
    """Calls up to the end of their section. Around the arguments may stand a fence."""

    calls: Calls
    begin: str
    """What begins a call."""
    close: str
    """What ends a call."""
    end: str
    """What ends the section."""
    name: re.Pattern[str]
    """What may stand before the arguments; its group 1 is the name."""
    _held: str = ""
    _scanner: ObjectScanner | None = None
    _open: bool = False

    def feed(self, text: str) -> tuple[list[Part], str | None]:
        self._held += text
        parts: list[Part] = []
        while True:
            over = self._read(parts) if self._open else self._next(parts)
            if over is None:
                return parts, None
            if over:
                rest, self._held = self._held, ""
                return parts, rest

    def finish(self) -> list[Part]:
        if self._open or self._scanner is not None:
            return []
        return [ContentText(self._held)] if self._held.strip() else []

    def _next(self, parts: list[Part]) -> bool | None:
        """Read the head of a call. Returns whether the section is over, None to wait."""
        text = self._held.lstrip()
        if text.startswith(self.end):
            self._held = text[len(self.end) :]
            return True
        if not text.startswith(self.begin):
            return None if self.begin.startswith(text) or self.end.startswith(text) else True
        brace = text.find("{")
        head = text[len(self.begin) :] if brace < 0 else text[len(self.begin) : brace]
        match = self.name.match(head)
        if brace < 0 or match is None:
            closed = self.close in head and brace < 0
            return None if brace < 0 and not closed and len(head) < MAX_NAME else True
        parts.append(self.calls.begin(match[1]))
        self._held, self._scanner, self._open = text[brace:], ObjectScanner(), True
        return False

    def _read(self, parts: list[Part]) -> bool | None:
        """Read the arguments, and what closes them."""
        assert self._scanner is not None
        if not self._scanner.over:
            text, rest = self._held, self._scanner.feed(self._held)[1]
            own = text[: len(text) - len(rest)] if self._scanner.over else text
            if own:
                parts.append(self.calls.arguments(own))
            self._held = rest
            if not self._scanner.over:
                return None
        at = self._held.find(self.close)
        if at < 0:
            return None
        self._held, self._open = self._held[at + len(self.close) :], False
        return False
