"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from pilotfish.server.protocol.common import ApiModel, GenerationRequest, Unsupported, unsupported, wrong

MAX_TOP_LOGPROBS = 20

Role = Literal["system", "developer", "user", "assistant"]
ROLES = ("system", "developer", "user", "assistant")


def _content(value: Any) -> str:
    """Text, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise unsupported(f"has a part of type {kind!r}, but this model takes only text")
        if kind is None or not isinstance(part.get("text"), str):
            raise wrong('must be a string or a list of text parts, such as {"type": "text", "text": "Hello"}')
        texts.append(part["text"])
    return "\n".join(texts)


def _role(value: Any) -> Role:
    if value in ("tool", "function"):
        raise unsupported(f"is {value!r}, but this server does not support tools")
    for role in ROLES:
        if value == role:
            return role  # type: ignore[return-value]
    raise wrong(f"is {value!r}, but must be one of {', '.join(map(repr, ROLES))}")


class Message(ApiModel):
    role: Annotated[Role, PlainValidator(_role, json_schema_input_type=Role)]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    # What OpenAI's client sends back of an answer: null or empty, as long as there are no tools.
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    """As max_tokens, which OpenAI calls deprecated. Default: what the context has room for."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    response_format: Any = None
    modalities: Any = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Values for the model's chat template, such as {"enable_thinking": false}."""

    # Known to OpenAI, and without effect on the text here.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None

    @field_validator("response_format")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        if value not in (None, {"type": "text"}):
            raise unsupported('must be {"type": "text"} or left out: this server does not support structured output')
        return value

    @field_validator("modalities")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if value not in (None, ["text"]):
            raise unsupported('must be ["text"] or left out: this model answers in text')
        return value

    @field_validator("tool_choice")
    @classmethod
    def _no_tool(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise unsupported("is not supported by this server, which has no tools: leave it out")
        return value
