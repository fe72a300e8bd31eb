"""Responses, events and errors of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pilotfish.server.protocol.usage import Timings


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Always empty: what comes back is not verified."""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Any
    """A JSON object."""


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """The prompt has input_tokens and cache_read_input_tokens together."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    """Always 0: what was computed is in the cache afterwards, at no price."""
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    service_tier: str | UnsetType = UNSET
    """Not at the end of a stream."""


class Message(msgspec.Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    role: str = "assistant"
    model: str
    content: Sequence[ContentBlock]
    stop_reason: str | None = None
    """null at the start of a stream."""
    stop_sequence: str | None = None
    usage: MessageUsage
    timings: Timings | UnsetType = UNSET
    """Pilotfish's own, of whole messages."""


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: Message


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    pass


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: ContentBlock


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag_field="type", tag="signature_delta"):
    signature: str = ""


class InputJsonDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopFields(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    delta: StopFields
    usage: MessageUsage
    timings: Timings
    """Pilotfish's own."""


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass


class TokenCount(msgspec.Struct):
    input_tokens: int


class MessagesErrorFields(msgspec.Struct):
    type: str
    message: str


class MessagesError(msgspec.Struct, tag_field="type", tag="error"):
    error: MessagesErrorFields
    request_id: str | None
