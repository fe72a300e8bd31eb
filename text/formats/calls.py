"""Readers of tool calls: from the text after a format's opening marker to parts of a message.

A reader may get any amount of text at once, and never loses any: what it cannot read as a call is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pilotfish.text.formats.scanner import ObjectScanner
from pilotfish.text.message import CallArguments, CallBegin, ContentText, Part

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Keys under which models write a call's arguments."""
_OTHERS = ("name", "function", "type", "id", "description")
"""Further keys that an object may have before a call's name."""
MAX_NAME = 512
"""Characters within which the arguments begin that follow a name."""
_NAME = re.compile(r"[\w.-]+")


@dataclass(slots=True)
class Calls:
    """The calls of a message so far."""

    names: Mapping[str, Mapping[str, Any]]
    """The tools that may be called, with the schemas of their arguments in order; of formats that begin like content,
    other names are none."""
    new_id: Callable[[], str]
    count: int = 0

    def begin(self, name: str) -> CallBegin:
        self.count += 1
        return CallBegin(self.count - 1, self.new_id(), name)

    def arguments(self, text: str) -> CallArguments:
        """Return an addition to the arguments of the last call."""
        return CallArguments(self.count - 1, text)


class CallReader(Protocol):
    def feed(self, text: str) -> tuple[Sequence[Part], str | None]:
        """Add text. Returns parts, and once the calls are over, the text that follows them; until then None."""
        ...

    def finish(self) -> Sequence[Part]:
        """Return what is left, now that nothing follows."""
        ...


class JsonCall:
    """One JSON object with a name and arguments, which are passed on as they grow."""

    def __init__(self, calls: Calls, known: bool = False, before: str = "") -> None:
        """`known`: whether the name must be that of a tool, else the object is content; so is what was `before` it."""
        self._calls, self._known = calls, known
        self._scanner = ObjectScanner()
        self._raw = before
        """All of the text, as long as it may still be content."""
        self._named: CallBegin | None = None
        self._name = ""
        self._held = ""
        """Arguments that came before the name, or that are a string to be decoded."""
        self._quoted: bool | None = None
        self._any = False
        self.failed = False
        """Whether it has turned out to be content."""

    @property
    def over(self) -> bool:
        return self._scanner.over or self.failed

    def feed(self, text: str) -> tuple[list[Part], str]:
        """Add text. Returns parts, and the text after the object, empty as long as it goes on."""
        values, rest = self._scanner.feed(text)
        if self._named is None:
            self._raw += text[: len(text) - len(rest)]
        parts: list[Part] = []
        for value in values:
            if self._known and self._named is None and value.key not in (*ARGUMENTS, *_OTHERS):
                self.failed = True
                return [], rest
            if value.key in ("name", "function") and self._named is None:
                self._name += value.text
                if value.done:
                    parts += self._begin()
            elif value.key in ARGUMENTS:
                parts += self._arguments(value.text, value.done)
        return parts, rest

    def close(self) -> list[Part]:
        """Return what is left, when the object or the answer ends."""
        if self._named is None:
            raw, self._raw, self.failed = self._raw, "", True
            return [ContentText(raw)] if raw else []
        parts: list[Part] = []
        if self._held:
            parts.append(self._calls.arguments(self._held))
            self._held = ""
        elif not self._any and self.over:
            parts.append(self._calls.arguments("{}"))
        self._any = True
        return parts

    def _begin(self) -> list[Part]:
        try:
            name = json.loads(self._name)
        except ValueError:
            return []
        if not isinstance(name, str) or (self._known and name not in self._calls.names):
            self._name = ""
            return []
        self._named, self._raw = self._calls.begin(name), ""
        parts: list[Part] = [self._named]
        if self._held and not self._quoted:
            parts.append(self._calls.arguments(self._held))
            self._held, self._any = "", True
        return parts

    def _arguments(self, text: str, done: bool) -> list[Part]:
        if self._quoted is None and text:
            self._quoted = text[0] == '"'
        if self._quoted:
            self._held += text
            if not done:
                return []
            text, self._held = _decoded(self._held), ""
        text = text.rstrip() if done else text
        if self._named is None:
            self._held, self._quoted = self._held + text, False
            return []
        if not text:
            return []
        self._any = True
        return [self._calls.arguments(text)]


def _decoded(raw: str) -> str:
    """Return the text of arguments that are JSON within a JSON string."""
    try:
        return str(json.loads(raw))
    except ValueError:
        return raw


@dataclass(slots=True)
class JsonCalls:
    """JSON objects up to a closing marker: `{...}</tool_call>`, `[{...}, {...}]`, `{...}; {...}`."""

    calls: Calls
    end: str = ""
    """What closes them; "" where they end with the last object, or a list with its bracket."""
    separators: str = " \t\r\n,;"
    in_list: bool = False
    known: bool = False
    """Whether only objects that name a tool are calls; others are content."""
    begin: str = ""
    """What may stand before the first object."""
    fence: str = ""
    """What closes them if they begin with `begin`."""
    _object: JsonCall | None = None
    _between: str = ""
    _seen: bool = False

    def feed(self, text: str) -> tuple[list[Part], str | None]:
        parts: list[Part] = []
        while text:
            if self._object is not None:
                found, rest = self._object.feed(text)
                parts += found
                if not self._object.over:
                    return parts, None
                parts += self._object.close()
                failed = self._object.failed
                self._object, self._seen, text = None, True, rest
                if failed:
                    return parts, text
                if not self.end and not self.in_list and ";" not in self.separators:
                    return parts, text
                continue
            self._between += text
            text = ""
            after = self._after_between()
            if after is None:
                return parts, None
            over, text = after
            if over:
                return parts, text
        return parts, None

    def finish(self) -> list[Part]:
        parts: list[Part] = [] if self._object is None else self._object.close()
        between, self._between = self._between, ""
        if between.strip(self.separators + "[") and not self.end.startswith(between.strip()):
            parts.append(ContentText(between))
        return parts

    def _after_between(self) -> tuple[bool, str] | None:
        """Decide about the text between objects: whether the calls are over and what follows, or None to wait."""
        skipped = self._between.lstrip(self.separators + ("[" if self.in_list and not self._seen else ""))
        if self.begin and not self._seen:
            self.end = self.fence if skipped.startswith(self.begin) else self.end
            skipped = skipped.removeprefix(self.begin).lstrip()
        if not skipped:
            return None
        if skipped[0] == "{":
            before = self._between[: len(self._between) - len(skipped)]
            self._object, self._between = JsonCall(self.calls, self.known, before), ""
            return False, skipped
        if self.in_list and skipped[0] == "]":
            self.in_list, self._between = False, ""
            if not self.end:
                return True, skipped[1:]
            self._between = skipped[1:]
            return self._after_between()
        if self.end and skipped.startswith(self.end):
            self._between = ""
            return True, skipped[len(self.end) :]
        if self.end and self.end.startswith(skipped):
            return None
        rest, self._between = self._between, ""
        return True, rest


@dataclass(slots=True)
class NamedJson:
    """A name, a marker, and the arguments as an object: Mistral's `name[ARGS]{...}`."""

    calls: Calls
    middle: tuple[str, ...]
    """What may stand between name and arguments, such as "[ARGS]"."""
    end: str = ""
    _held: str = ""
    _scanner: ObjectScanner | None = None

    def feed(self, text: str) -> tuple[list[Part], str | None]:
        parts: list[Part] = []
        if self._scanner is None:
            self._held += text
            brace = self._held.find("{", 0, MAX_NAME)
            if brace < 0:
                return (parts, None) if len(self._held) < MAX_NAME else (parts, self._held)
            head, text = self._held[:brace], self._held[brace:]
            name = min((head.partition(marker)[0] for marker in self.middle), key=len).strip()
            if not _NAME.fullmatch(name):
                return parts, self._held
            parts.append(self.calls.begin(name))
            self._scanner, self._held = ObjectScanner(), ""
        if not self._scanner.over:
            rest = self._scanner.feed(text)[1]
            own = text[: len(text) - len(rest)] if self._scanner.over else text
            parts.append(self.calls.arguments(own))
            if not self._scanner.over:
                return parts, None
            text = rest
        if not self.end:
            return parts, text
        self._held += text
        found = self._held.lstrip()
        if found.startswith(self.end):
            return parts, found[len(self.end) :]
        return (parts, None) if self.end.startswith(found) else (parts, self._held)

    def finish(self) -> list[Part]:
        return [ContentText(self._held)] if self._held.strip() else []


@dataclass(slots=True)
class MistralCalls:
    """What follows Mistral's [TOOL_CALLS]: a list of objects, or one `name[ARGS]{...}`; models differ."""

    calls: Calls
    _held: str = ""
    _reader: CallReader | None = None

    def feed(self, text: str) -> tuple[Sequence[Part], str | None]:
        if self._reader is None:
            self._held += text
            text, first = self._held, self._held.lstrip()[:1]
            if not first:
                return [], None
            if first in "[{":
                self._reader = JsonCalls(self.calls, in_list=True)
            else:
                self._reader = NamedJson(self.calls, ("[ARGS]", "[CALL_ID]"))
        return self._reader.feed(text)

    def finish(self) -> Sequence[Part]:
        return [] if self._reader is None else self._reader.finish()
