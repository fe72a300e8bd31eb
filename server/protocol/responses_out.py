"""Responses and events of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pilotfish.server.protocol.chat import TokenLogprob
from pilotfish.server.protocol.usage import Timings

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()
    logprobs: Sequence[TokenLogprob] = ()


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning", kw_only=True):
    id: str
    summary: tuple[()] = ()
    content: list[ReasoningText]
    encrypted_content: None = None
    status: Status = "in_progress"


class FunctionCallItem(msgspec.Struct, tag_field="type", tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "in_progress"


Item = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, while it is made and when it is done."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
    timings: Timings | UnsetType = UNSET


class Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int


class Created(Event, kw_only=True, tag="response.created"):
    response: ResponseObject


class InProgress(Event, kw_only=True, tag="response.in_progress"):
    response: ResponseObject


class Completed(Event, kw_only=True, tag="response.completed"):
    response: ResponseObject


class Incomplete(Event, kw_only=True, tag="response.incomplete"):
    response: ResponseObject


class ItemAdded(Event, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: Item


class ItemDone(Event, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: Item


class PartEvent(Event, kw_only=True):
    item_id: str
    output_index: int
    content_index: int = 0


class PartAdded(PartEvent, kw_only=True, tag="response.content_part.added"):
    part: OutputText | ReasoningText


class PartDone(PartEvent, kw_only=True, tag="response.content_part.done"):
    part: OutputText | ReasoningText


class TextDelta(PartEvent, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: Sequence[TokenLogprob] = ()


class TextDone(PartEvent, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: Sequence[TokenLogprob] = ()


class ReasoningDelta(PartEvent, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(PartEvent, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(Event, kw_only=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, kw_only=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str


class DeletedResponse(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class InputItems(msgspec.Struct):
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
    object: str = "list"
