"""Harmony, the format of gpt-oss: an answer is messages, each on a channel, with special tokens around.

`openai-harmony` is not used: its parser takes the tokens of one vocabulary, which it downloads, and knows no grammar;
here answers are text, in which special tokens are spelled out, of whatever tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pilotfish.text.formats.calls import CallReader, Calls, NamedJson
from pilotfish.text.formats.message_format import CallFormat, MessageFormat, SchemaBuilder, schemas_of
from pilotfish.text.formats.parser import first_of, held, joined
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.message import (
    OPEN,
    CallBegin,
    ContentText,
    MessageParser,
    NamedTool,
    Part,
    ReasoningText,
    Tool,
    ToolChoice,
)

START, END, MESSAGE, CHANNEL, CONSTRAIN = "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"
CALL, RETURN = "<|call|>", "<|return|>"
"""What ends an answer: a call, or a final message. Most checkpoints have both among the tokens that end one."""
MARKERS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)
_TO = " to="
_HEADERS = (START, CHANNEL, _TO)
"""What a header begins with; the prompt has opened the first one, as `<|start|>assistant`."""
_CLOSERS = (END, CALL, RETURN, START, CHANNEL)
_MOST_HEADER = 512
"""Characters of a header, with the marker that ends it."""
_RECIPIENT = re.compile(r" to=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_GAP = "\n"
"""What is put between two messages of reasoning, or of content."""
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that gpt-oss does not know."""


def _reader(calls: Calls) -> CallReader:
    return NamedJson(calls, (" ", CONSTRAIN, MESSAGE), CALL)


HARMONY_CALLS = CallFormat(
    name="harmony",
    opener=f"{CHANNEL}commentary to=functions.",
    reader=_reader,
    written=lambda tool, arguments: (f"{tool.name} {CONSTRAIN}json{MESSAGE}", arguments, CALL),
    instructions=f"write its name and arguments to the commentary channel:\n{CHANNEL}commentary to=functions."
    f'function_name {CONSTRAIN}json{MESSAGE}{{"argument": "value"}}{CALL}',
)
HARMONY_REASONING = (f"{CHANNEL}analysis{MESSAGE}", END)


class HarmonyParser:
    """Reasoning is what is on the channel `analysis`; a message to a function is a call of it; all else is content.
    White space is kept. `calls`: None if calls are content."""

    def __init__(
        self, calls: Calls | None, reasons: bool = True, in_reasoning: bool = False, begun: bool = False
    ) -> None:
        self._calls, self._reasons = calls, reasons
        self.thoughts: list[tuple[int, int]] = []
        self._window = ""
        """Text that is held back."""
        self._length = 0
        self._body: type[Part] | None = None
        """What the message is that is being read; None in a header, and between messages."""
        self._in_header = False
        self._spoken = False
        """Whether a final message or a call has begun: reasoning does not follow them."""
        self._said: set[type[Part]] = set()
        """What there was in earlier messages."""
        self._empty = True
        """Whether the message that is being read has no text so far."""
        if in_reasoning or begun:
            self._open(ReasoningText if in_reasoning else ContentText)

    @property
    def thinking(self) -> bool:
        return self._reasons and not self._spoken

    def feed(self, text: str) -> Sequence[Part]:
        parts: list[Part] = []
        self._window += text
        self._length += len(text)
        while self._find(parts) if self._body is None else self._read(parts):
            pass
        return joined(parts)

    def finish(self) -> Sequence[Part]:
        parts: list[Part] = []
        if self._body is None and self._window and not self._window.startswith((START, CHANNEL)):
            self._open(ContentText)
        if self._body is not None:
            self._say(self._window, parts)
            self._close(parts)
        self._window = ""
        return joined(parts)

    def _find(self, parts: list[Part]) -> bool:
        """Read a header; return whether there may be more to read."""
        window = self._window
        if not self._in_header:
            if any(begin != window and begin.startswith(window) for begin in _HEADERS):
                return False
            self._in_header = window.startswith(_HEADERS)
            if not self._in_header:
                self._open(ContentText)
                return True
        at, marker = first_of(window[:_MOST_HEADER], (MESSAGE, END, CALL, RETURN))
        if marker == MESSAGE:
            self._window = window[at + len(MESSAGE) :]
            self._begin(window[:at], parts)
            return True
        if marker:  # a header of nothing
            self._window, self._in_header = window[at + len(marker) :], False
            return bool(self._window)
        if len(window) < _MOST_HEADER:
            return False
        begin = next(each for each in _HEADERS if window.startswith(each))
        self._open(ContentText)
        self._say(begin, parts)
        self._window = window[len(begin) :]
        return True

    def _begin(self, header: str, parts: list[Part]) -> None:
        recipient, channels = _RECIPIENT.search(header), _CHANNEL.findall(header)
        if recipient is not None and self._calls is not None:
            self._open(CallBegin)
            parts.append(self._calls.begin(recipient[1]))
        elif channels and channels[-1] == "analysis" and self._reasons:
            self._open(ReasoningText)
        else:
            self._open(ContentText, final=not channels or channels[-1] != "commentary")

    def _open(self, body: type[Part], final: bool = True) -> None:
        self._body, self._in_header, self._empty = body, False, True
        self._spoken |= final and body is not ReasoningText
        if body is ReasoningText:
            self.thoughts.append((self._length - len(self._window), OPEN))

    def _read(self, parts: list[Part]) -> bool:
        """Read a message; return whether there may be more to read."""
        window = self._window
        at, marker = first_of(window, _CLOSERS)
        shown = window[:at] if marker else window[: len(window) - held(window, _CLOSERS)]
        self._say(shown, parts)
        if not marker:
            self._window = window[len(shown) :]
            return False
        if self._body is ReasoningText:
            self.thoughts[-1] = self.thoughts[-1][0], self._length - len(window) + at
        self._close(parts)
        self._window = window[at:] if marker in (START, CHANNEL) else window[at + len(marker) :]
        return bool(self._window)

    def _say(self, text: str, parts: list[Part]) -> None:
        if self._body is CallBegin and self._empty:
            text = text.lstrip()
        if not text:
            return
        gap = _GAP if self._empty and self._body in self._said else ""
        self._empty = False
        if self._body is ReasoningText:
            parts.append(ReasoningText(gap + text))
        elif self._body is ContentText:
            parts.append(ContentText(gap + text))
        else:
            assert self._calls is not None
            parts.append(self._calls.arguments(text))

    def _close(self, parts: list[Part]) -> None:
        if self._body is CallBegin and self._empty:
            self._say("{}", parts)
        if self._body is not None and self._body is not CallBegin and not self._empty:
            self._said.add(self._body)
        self._body = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonyFormat(MessageFormat):
    """How gpt-oss writes messages. Without `reasoning` or `calls`, they are content."""

    @property
    def shown(self) -> frozenset[int]:
        return frozenset(id_ for spelling, id_ in self.special.items() if spelling in MARKERS)

    @property
    def thinks_again(self) -> bool:
        return True

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(self.special[each] for each in (CALL, RETURN) if each in self.special)

    def plain(self) -> MessageFormat:
        return HarmonyFormat(special=self.special)

    def effort(self, wanted: str) -> str:
        return _EFFORTS.get(wanted, wanted)

    def parser(
        self,
        tools: Sequence[Tool] = (),
        *,
        in_reasoning: bool = False,
        begun: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> MessageParser:
        calls = None
        if tools and self.calls is not None:
            calls = Calls({tool.name: schemas_of(tool) for tool in tools}, new_id or self.new_id)
        return HarmonyParser(calls, self.reasoning is not None, in_reasoning, begun)

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        schema: SchemaBuilder,
        parallel: bool = True,
        answer: Grammar | None = None,
        in_reasoning: bool = False,
        begun: bool = False,
        place: str = "tools",
    ) -> Grammar | None:
        """A call ends the answer, so there is one at most. Reasoning and remarks may come before."""
        if begun and not in_reasoning:  # the final message
            return answer
        ends: list[Grammar] = []
        if tools and choice != "none" and self.calls is not None:
            wanted = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.name == choice.name]
            ends += [self._call(tool, f"{place}[{tools.index(tool)}]", schema) for tool in wanted]
        elif answer is None:
            return None
        if not ends or choice == "auto":
            kind = compose.optional(self._literal(f" {CONSTRAIN}json"))
            final = self._sequence(f"{CHANNEL}final", kind, MESSAGE)
            ends.append(compose.sequence(final, compose.any_text() if answer is None else answer))
        closed = self._sequence(compose.text_until(self._marker(END)), f"{START}assistant")
        before = [self._sequence(f"{CHANNEL}{name}{MESSAGE}", closed) for name in ("analysis", "commentary")]
        whole = compose.sequence(compose.repeat(compose.either(*before)), compose.either(*ends))
        return compose.sequence(closed, whole) if in_reasoning else whole

    def _written(self, tool: Tool, arguments: Grammar) -> Grammar:
        to = f"{_TO}functions.{tool.name}"
        kind = compose.optional(
            compose.either(*(self._literal(each) for each in (" json", f"{CONSTRAIN}json", f" {CONSTRAIN}json")))
        )
        first = self._sequence(f"{CHANNEL}commentary{to}", kind, MESSAGE, arguments)
        return compose.either(first, self._sequence(f"{to}{CHANNEL}commentary", kind, MESSAGE, arguments))


def is_harmony(template: str) -> bool:
    return CHANNEL in template and MESSAGE in template


def harmony(special: dict[str, int], calls: bool, reasoning: bool) -> MessageFormat:
    fields: dict[str, Any] = {"calls": HARMONY_CALLS if calls else None}
    return HarmonyFormat(special=special, reasoning=HARMONY_REASONING if reasoning else None, **fields)
