"""From the parts of an answer to OpenAI's messages, whole and in deltas."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from pilotfish.server.protocol.chat import ChatDelta, ChatMessage, ChatRequest
from pilotfish.server.protocol.tools import Call, CallDelta, Function
from pilotfish.text.message import AssistantMessage, CallArguments, CallBegin, ContentText, Part, ReasoningText


def message_of(parts: Sequence[Part], body: ChatRequest) -> ChatMessage:
    """Return the message of a whole answer."""
    whole = AssistantMessage()
    whole.add(parts)
    message = ChatMessage(content=whole.content or (None if whole.calls else ""))
    if whole.reasoning and body.include_reasoning is not False:
        message.reasoning_content = message.reasoning = whole.reasoning
    if whole.calls and body.functions:
        message.function_call = Function(whole.calls[0].name, whole.calls[0].arguments)
    elif whole.calls:
        message.tool_calls = [Call(call.id, Function(call.name, call.arguments)) for call in whole.calls]
    return message


def deltas_of(parts: Sequence[Part], body: ChatRequest) -> list[ChatDelta]:
    """Return what each part adds to a message in a stream."""
    if len(parts) == 1 and isinstance(parts[0], ContentText):  # as most are
        return [ChatDelta(content=parts[0].text)]
    deltas = []
    for part in parts:
        match part:
            case ContentText(text):
                deltas.append(ChatDelta(content=text))
            case ReasoningText(text) if body.include_reasoning is not False:
                deltas.append(ChatDelta(reasoning_content=text, reasoning=text))
            case CallBegin(index, id_, name) if body.functions:
                if not index:
                    deltas.append(ChatDelta(function_call=Function(name)))
            case CallArguments(index, text) if body.functions:
                if not index:
                    deltas.append(ChatDelta(function_call=Function(UNSET, text)))
            case CallBegin(index, id_, name):
                deltas.append(ChatDelta(tool_calls=(CallDelta(index, Function(name), id_, "function"),)))
            case CallArguments(index, text):
                deltas.append(ChatDelta(tool_calls=(CallDelta(index, Function(UNSET, text)),)))
    return deltas


def finish_reason(reason: str | None, parts: Sequence[Part], body: ChatRequest, called: bool = False) -> str | None:
    """Return why the answer ended, in OpenAI's terms; `called`: whether a call came before these parts."""
    if reason == "stop" and (called or any(isinstance(part, CallBegin) for part in parts)):
        return "function_call" if body.functions else "tool_calls"
    return reason
