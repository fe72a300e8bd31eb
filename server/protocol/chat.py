"""Request and response of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast, get_args

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, FailFast, Field, PlainValidator

from pilotfish.errors import shown
from pilotfish.server.protocol.common import ApiModel, GenerationRequest, Unsupported, only, unsupported, wrong
from pilotfish.server.protocol.tools import (
    Call,
    CallDelta,
    CalledFunction,
    CallParam,
    Function,
    FunctionChoice,
    Functions,
    ToolChoiceParam,
    Tools,
)
from pilotfish.server.protocol.usage import Response, Timings, TokenOrigin, Usage

MAX_TOP_LOGPROBS = 20
Budget = Annotated[int | None, Field(ge=0, le=2**31 - 1)]

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


def _content(value: Any) -> str | None:
    """Return the text, or the text parts joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
            continue
        if kind is not None and kind != "text":
            raise unsupported(f"has a part of type {shown(kind)}, but this model takes only text")
        if kind is None or not isinstance(part.get("text"), str):
            raise wrong('must be a string or a list of text parts, such as {"type": "text", "text": "Hello"}')
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)]


def _role(value: Any) -> Role:
    if value not in get_args(Role):
        raise wrong(f"is {shown(value)}, but must be one of {', '.join(map(repr, get_args(Role)))}")
    return cast(Role, value)


class Message(ApiModel):
    """One message of a conversation. Keys that a client has added are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[Role, PlainValidator(_role, json_schema_input_type=Role)]
    content: Content = None
    """null only for an assistant's message."""
    name: str | None = None
    tool_calls: list[CallParam] | None = None
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    function_call: CalledFunction | None = None
    reasoning_content: Any = None
    """The reasoning of an earlier answer, by either of its names."""
    reasoning: Any = None
    prefix: Any = None
    """Whether the answer goes on with this message, the last one."""
    audio: Unsupported = None


_ONLY_TEXT_OUT = 'must be ["text"] or left out: this model answers in text'
_ONLY_MEDIUM = 'must be "medium" or left out: this model has no levels of verbosity'


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    """The newer name of max_tokens. Default: as many as fit into the context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    modalities: Annotated[Any, only(["text"], otherwise=_ONLY_TEXT_OUT)] = None
    tools: Tools = None
    tool_choice: ToolChoiceParam = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Values for the model's chat template, such as {"enable_thinking": false}."""

    parallel_tool_calls: bool | None = None
    functions: Functions = None
    """The older form of tools, with function_call for tool_choice."""
    function_call: FunctionChoice = None
    reasoning_effort: str | None = None
    """Passed to the chat template; "none" and "minimal" turn reasoning off, where the model can."""
    include_reasoning: bool | None = None
    """false: leave the reasoning out of the answer."""
    thinking_budget: Budget = None
    """Tokens of reasoning after which it is closed."""
    thinking_token_budget: Budget = None
    """vLLM's name of thinking_budget."""
    continue_final_message: bool | None = None
    """Go on with the last message, an assistant's."""
    add_generation_prompt: bool | None = None
    """Whether the prompt opens an assistant's message; true unless the last message is to go on."""

    audio: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
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
    content: str | None
    """null for an answer of nothing but calls."""
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    """Reasoning has two names, as clients look for one or the other."""
    reasoning: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET
    function_call: Function | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    provenance: list[TokenOrigin] | UnsetType = UNSET
    """Only with include_provenance."""


class ChatCompletion(Response):
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChatDelta(msgspec.Struct):
    """A chunk's addition to a message: the role in the first chunk, nothing in the last."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: tuple[CallDelta, ...] | UnsetType = UNSET
    function_call: Function | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    provenance: list[TokenOrigin] | UnsetType = UNSET


class ChatChunk(Response):
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    """Only in streams with include_usage: null before the last chunk, or the usage so far."""
    timings: Timings | UnsetType = UNSET
    """Only in the last chunk."""
