"""The content blocks of an answer, from the parts that its parser finds: as the events of a stream, and added up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec
from pydantic_core import from_json

from pilotfish.server.protocol.messages_out import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputJsonDelta,
    SignatureDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from pilotfish.text.message import CallArguments, CallBegin, ContentText, Part, ReasoningText

BlockEvent = BlockStart | BlockDelta | BlockStop

INVALID = "INVALID_JSON"
"""The key of arguments that are not JSON, under which Anthropic's documentation puts them."""


class BlockEvents:
    """Makes the events of an answer's content blocks, of which one is open at a time.

    White space between other blocks, which many models write, makes no block of text. An answer of nothing has an empty
    one: clients look at the first. Without `show_thinking`, thinking blocks are empty.
    """

    def __init__(self, show_thinking: bool = True) -> None:
        self._show_thinking = show_thinking
        self._index = -1
        """The index of the last block."""
        self._open: type[ContentBlock] | None = None
        self._space = ""
        """White space that has no block yet."""
        self.calls = 0

    def add(self, parts: Iterable[Part]) -> list[BlockEvent]:
        """Return the events of further parts."""
        return [event for part in parts for event in self._add(part)]

    def end(self) -> list[BlockEvent]:
        """Return the events after the last part."""
        events: list[BlockEvent] = []
        if self._index < 0:
            space = self._space
            events += self._begin(TextBlock(""))
            if space:
                events.append(BlockDelta(self._index, TextDelta(space)))
        return [*events, *self._close()]

    def _add(self, part: Part) -> Iterator[BlockEvent]:
        match part:
            case CallBegin(_, id_, name):
                self.calls += 1
                yield from self._begin(ToolUseBlock(id_, name, {}))
            case CallArguments(_, text) if text:
                yield BlockDelta(self._index, InputJsonDelta(text))
            case ReasoningText(text) if text:
                if self._open is not ThinkingBlock:
                    yield from self._begin(ThinkingBlock(""))
                if self._show_thinking:
                    yield BlockDelta(self._index, ThinkingDelta(text))
            case ContentText(text) if text:
                if self._open is not TextBlock:
                    self._space = text = self._space + text
                    if text.isspace():
                        return
                    yield from self._begin(TextBlock(""))
                yield BlockDelta(self._index, TextDelta(text))

    def _begin(self, block: ContentBlock) -> Iterator[BlockEvent]:
        yield from self._close()
        self._index, self._open, self._space = self._index + 1, type(block), ""
        yield BlockStart(self._index, block)

    def _close(self) -> Iterator[BlockEvent]:
        if self._open is ThinkingBlock:
            yield BlockDelta(self._index, SignatureDelta())
        if self._open is not None:
            yield BlockStop(self._index)
        self._open = None


def content_of(parts: Iterable[Part], show_thinking: bool = True) -> list[ContentBlock]:
    """Return the content blocks of a whole answer: what its events add up to."""
    events = BlockEvents(show_thinking)
    blocks: list[ContentBlock] = []
    texts: list[list[str]] = []
    for event in chain(events.add(parts), events.end()):
        match event:
            case BlockStart(_, block):
                blocks.append(block)
                texts.append([])
            case BlockDelta(index, TextDelta(text) | ThinkingDelta(text) | InputJsonDelta(text)):
                texts[index].append(text)
    return [_filled(block, "".join(own)) for block, own in zip(blocks, texts, strict=True)]


def _filled(block: ContentBlock, text: str) -> ContentBlock:
    match block:
        case TextBlock():
            block.text = text
        case ThinkingBlock():
            block.thinking = text
        case ToolUseBlock():
            block.input = _input(text)
    return block


def _input(arguments: str) -> msgspec.Raw:
    """Return a call's arguments as JSON of an object: as the model wrote them, which keeps the digits of numbers; of
    those that are cut off or go wrong, the object that they begin with, as Anthropic's client makes it of a stream."""
    try:
        if isinstance(from_json(arguments, allow_inf_nan=False), dict):
            return msgspec.Raw(arguments.encode())
    except ValueError:
        pass
    try:
        begun = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=True)
        whole = json.dumps(begun, allow_nan=False)
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        whole = json.dumps({INVALID: arguments})
    return msgspec.Raw(whole.encode())
