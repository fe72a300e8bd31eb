"""Request and response of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast, get_args

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, FailFast, Field, PlainValidator

from pilotfish.errors import shown
from pilotfish.server.protocol.common import ApiModel, GenerationRequest, Unsupported, only, unsupported, wrong
from pilotfish.server.protocol.usage import Response, Timings, Usage

MAX_TOP_LOGPROBS = 20

Role = Literal["system", "developer", "user", "assistant"]


def _content(value: Any) -> str:
    """Return the text, or the text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise unsupported(f"has a part of type {shown(kind)}, but this model takes only text")
        if kind is None or not isinstance(part.get("text"), str):
            raise wrong('must be a string or a list of text parts, such as {"type": "text", "text": "Hello"}')
        texts.append(part["text"])
    return "\n".join(texts)


def _role(value: Any) -> Role:
    if value in ("tool", "function"):
        raise unsupported(f"is {value!r}, but this server does not support tools")
    if value not in get_args(Role):
        raise wrong(f"is {shown(value)}, but must be one of {', '.join(map(repr, get_args(Role)))}")
    return cast(Role, value)


class Message(ApiModel):
    """One message of a conversation. Keys that a client has added are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[Role, PlainValidator(_role, json_schema_input_type=Role)]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    # OpenAI's client sends these back with an answer; they are null or empty.
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None


_ONLY_TEXT = 'must be {"type": "text"} or left out: this server does not support structured output'
_ONLY_TEXT_OUT = 'must be ["text"] or left out: this model answers in text'
_NO_REASONING = 'must be "none" or left out: this model has no levels of reasoning'
_ONLY_MEDIUM = 'must be "medium" or left out: this model has no levels of verbosity'
_NO_TOOLS = "is not supported by this server, which has no tools: leave it out"


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    """The newer name of max_tokens. Default: as many as fit into the context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    response_format: Annotated[Any, only({"type": "text"}, otherwise=_ONLY_TEXT)] = None
    modalities: Annotated[Any, only(["text"], otherwise=_ONLY_TEXT_OUT)] = None
    tool_choice: Annotated[Any, only("none", "auto", otherwise=_NO_TOOLS)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Values for the model's chat template, such as {"enable_thinking": false}."""

    parallel_tool_calls: bool | None = None

    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    reasoning_effort: Annotated[Any, only("none", otherwise=_NO_REASONING)] = None
    verbosity: Annotated[Any, only("medium", otherwise=_ONLY_MEDIUM)] = None


class TopLogprob(msgspec.Struct):
    """A token, its log-probability and its UTF-8 bytes, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest tokens at its position, likeliest first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(Response):
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChatDelta(msgspec.Struct):
    """A chunk's addition to a message: the role in the first chunk, nothing in the last."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Response):
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    """Only in streams with include_usage: null before the last chunk, or the usage so far."""
    timings: Timings | UnsetType = UNSET
    """Only in the last chunk."""
