"""From the parts of an answer to output items, and the events of a stream that adds up to them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from pilotfish.server.protocol import responses_out as out
from pilotfish.server.protocol.chat import TokenLogprob
from pilotfish.text.message import CallArguments, CallBegin, ContentText, Part, ReasoningText


class Output:
    """The output items so far. Each `add` returns the events of some parts, `end` those after the last one."""

    def __init__(self) -> None:
        self.items: list[out.Item] = []
        self._open: out.Item | None = None
        self._numbers = count()

    def number(self) -> int:
        """Return the next event's sequence number."""
        return next(self._numbers)

    def add(self, parts: Sequence[Part], logprobs: Sequence[TokenLogprob] = ()) -> list[msgspec.Struct]:
        """`logprobs`: of the tokens whose text begins in these parts."""
        events: list[msgspec.Struct] = []
        for part in parts:
            match part:
                case ReasoningText(text):
                    self._reason(text, events)
                case ContentText(text):
                    self._say(text, logprobs, events)
                    logprobs = ()
                case CallBegin(_, id_, name):
                    self._close("completed", events)
                    item = out.FunctionCallItem(id=_id("fc"), call_id=id_, name=name, arguments="")
                    self._begin(item, events)
                case CallArguments(_, text):
                    call = self._open
                    assert isinstance(call, out.FunctionCallItem)
                    call.arguments += text
                    events.append(
                        out.ArgumentsDelta(
                            sequence_number=self.number(), item_id=call.id, output_index=self._index, delta=text
                        )
                    )
        return events

    def end(self, status: out.Status) -> list[msgspec.Struct]:
        """`status`: of the last item, which may have been cut off."""
        events: list[msgspec.Struct] = []
        if not self.items and status == "completed":  # an empty answer is an empty message
            self._say("", (), events)
        self._close(status, events)
        return events

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _begin(self, item: out.Item, events: list[msgspec.Struct]) -> None:
        self.items.append(item)
        self._open = item
        added = msgspec.structs.replace(item)
        if isinstance(added, out.MessageItem | out.ReasoningItem):
            added.content = []
        events.append(out.ItemAdded(sequence_number=self.number(), output_index=self._index, item=added))

    def _reason(self, text: str, events: list[msgspec.Struct]) -> None:
        item = self._open
        if not isinstance(item, out.ReasoningItem):
            self._close("completed", events)
            item = out.ReasoningItem(id=_id("rs"), content=[out.ReasoningText("")])
            self._begin(item, events)
            events.append(out.PartAdded(**self._place(item), part=out.ReasoningText("")))
        item.content[0].text += text
        events.append(out.ReasoningDelta(**self._place(item), delta=text))

    def _say(self, text: str, logprobs: Sequence[TokenLogprob], events: list[msgspec.Struct]) -> None:
        item = self._open
        if not isinstance(item, out.MessageItem):
            self._close("completed", events)
            item = out.MessageItem(id=_id("msg"), content=[out.OutputText("")])
            self._begin(item, events)
            events.append(out.PartAdded(**self._place(item), part=out.OutputText("")))
        content = item.content[0]
        content.text += text
        content.logprobs = [*content.logprobs, *logprobs]
        if text or logprobs:
            events.append(out.TextDelta(**self._place(item), delta=text, logprobs=logprobs))

    def _close(self, status: out.Status, events: list[msgspec.Struct]) -> None:
        item = self._open
        if item is None:
            return
        item.status = status
        match item:
            case out.MessageItem(content=[text]):
                events.append(out.TextDone(**self._place(item), text=text.text, logprobs=text.logprobs))
                events.append(out.PartDone(**self._place(item), part=text))
            case out.ReasoningItem(content=[thought]):
                events.append(out.ReasoningDone(**self._place(item), text=thought.text))
                events.append(out.PartDone(**self._place(item), part=thought))
            case out.FunctionCallItem():
                events.append(
                    out.ArgumentsDone(
                        sequence_number=self.number(),
                        item_id=item.id,
                        output_index=self._index,
                        name=item.name,
                        arguments=item.arguments,
                    )
                )
        events.append(out.ItemDone(sequence_number=self.number(), output_index=self._index, item=item))
        self._open = None

    def _place(self, item: out.Item) -> dict[str, Any]:
        return {"sequence_number": self.number(), "item_id": item.id, "output_index": self._index, "content_index": 0}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
