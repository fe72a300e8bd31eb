"""The parts of an assistant's message, as a parser finds them in the tokens of an answer: reasoning, content and tool
calls. Chat, responses and messages translate them into their own events. And the tools that an answer may call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """An addition to the reasoning before an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """An addition to what the message says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. `index` counts the message's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """An addition to the arguments of call `index`, which are JSON text."""

    index: int
    text: str


Part = ReasoningText | ContentText | CallBegin | CallArguments

OPEN = sys.maxsize
"""The end of reasoning that is not closed."""


class MessageParser(Protocol):
    """Finds the parts of one answer. What it finds does not depend on how the tokens are portioned: the same tokens,
    one by one or all at once, give the same message, and the parts of a stream add up to it."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends within reasoning, or reasoning may still begin."""
        ...

    @property
    def thoughts(self) -> Sequence[tuple[int, int]]:
        """Where in the text reasoning begins and ends, without its markers; the end of the last one may be OPEN."""
        ...

    def feed(self, text: str) -> Sequence[Part]:
        """Add text, in which special tokens are spelled out if the format needs them. Returns the parts that it
        completes, and holds back what may still become a marker."""
        ...

    def finish(self) -> Sequence[Part]:
        """Return what was held back, now that nothing follows."""
        ...


@dataclass(slots=True)
class ToolCall:
    """A call of a tool, in an answer or in a conversation's history."""

    id: str
    name: str
    arguments: str
    """JSON text of an object."""


@dataclass(slots=True)
class AssistantMessage:
    """A whole message, added up from parts."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case ReasoningText(text):
                    self.reasoning += text
                case ContentText(text):
                    self.content += text
                case CallBegin(_, id_, name):
                    self.calls.append(ToolCall(id_, name, ""))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None: no arguments."""
    strict: bool = False
    """Whether arguments must match the schema: a grammar sees to it."""
    place: str | None = None
    """Where the client sent `parameters`, for errors; None: where OpenAI's chat has them."""


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The tool_choice that demands a call of one tool."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool
