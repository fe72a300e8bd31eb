"""Requests of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, TypeAdapter

from pilotfish.errors import shown
from pilotfish.server.protocol.common import ApiModel, SchedulingFields, Stops, unsupported, wrong
from pilotfish.server.protocol.foreign import Foreign
from pilotfish.server.protocol.messages_foreign import MESSAGES_FOREIGN
from pilotfish.server.protocol.tools import MAX_TOOLS, FunctionName, ObjectSchema


class Part(BaseModel):
    """A JSON object within a request. Keys that a client has added are ignored, as is `cache_control`."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextBlockParam(Part):
    type: Literal["text"]
    text: str


class ThinkingBlockParam(Part):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlockParam(Part):
    """Reasoning that only another server can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlockParam(Part):
    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]


def _texts(value: Any) -> tuple[TextBlockParam, ...]:
    """Return text blocks; a string stands for one, null for none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (TextBlockParam(type="text", text=value),)
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text blocks")
    return tuple(_TEXTS.validate_python(value))


Texts = Annotated[
    tuple[TextBlockParam, ...], PlainValidator(_texts, json_schema_input_type=str | list[TextBlockParam] | None)
]


class ToolResultBlockParam(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ()
    is_error: bool | None = None


Block = TextBlockParam | ThinkingBlockParam | RedactedThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam

_KINDS: Mapping[str, type[Block]] = {
    "text": TextBlockParam,
    "thinking": ThinkingBlockParam,
    "redacted_thinking": RedactedThinkingBlockParam,
    "tool_use": ToolUseBlockParam,
    "tool_result": ToolResultBlockParam,
}


def _block(value: Any, kinds: Mapping[str, type[Part]]) -> Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise wrong('must be a content block, such as {"type": "text", "text": "Hello"}')
    if kind not in kinds:
        raise unsupported(f"has type {shown(kind)}, but this server takes only {_listed(kinds)} here")
    return kinds[kind].model_validate(value)


def _listed(names: Mapping[str, object]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


# Only the first of a list's errors is shown, and a client could send thousands.
_TEXTS: TypeAdapter[list[TextBlockParam]] = TypeAdapter(
    Annotated[
        list[Annotated[TextBlockParam, PlainValidator(lambda value: _block(value, {"text": TextBlockParam}))]],
        FailFast(),
    ]
)
_BLOCKS: TypeAdapter[list[Block]] = TypeAdapter(
    Annotated[list[Annotated[Block, PlainValidator(lambda value: _block(value, _KINDS))]], FailFast()]
)


def _content(value: Any) -> list[Block]:
    """Return content blocks; a string stands for one of text."""
    if isinstance(value, str):
        return [TextBlockParam(type="text", text=value)]
    if not isinstance(value, list):
        raise wrong("must be a string or a list of content blocks")
    return _BLOCKS.validate_python(value)


class MessageParam(Part):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], PlainValidator(_content, json_schema_input_type=str | list[Block])]


def _only_custom(value: Any) -> Any:
    if value not in (None, "custom"):
        raise unsupported(f"is {shown(value)}, but this server takes only custom tools, which the client runs")
    return value


class ToolParam(Part):
    """A function that the model may call."""

    type: Annotated[str | None, PlainValidator(_only_custom, json_schema_input_type=Literal["custom"] | None)] = None
    name: FunctionName
    description: str | None = None
    input_schema: ObjectSchema
    strict: bool | None = None
    """Whether the input must match the schema."""


class ToolChoiceParam(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Only of type "tool"."""
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Field(ge=1)] = None
    """Only of type "enabled"."""
    display: Literal["summarized", "omitted"] | None = None
    """"omitted": thinking blocks are empty."""


class JsonFormatParam(Part):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfigParam(ApiModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormatParam | None = None


class ConversationRequest(SchedulingFields):
    """What both endpoints take. null stands for the default."""

    foreign: ClassVar[Mapping[str, Foreign]] = MESSAGES_FOREIGN

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1), FailFast()]
    system: Texts = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Stops = ()
    stream: bool | None = None
    tools: Annotated[list[ToolParam] | None, Field(max_length=MAX_TOOLS), FailFast()] = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfigParam | None = None
    output_format: JsonFormatParam | None = None
    """The older place of output_config.format."""

    metadata: Any = None
    """`user_id` in it is the user, as `user` is for OpenAI's endpoints."""

    # Anthropic's fields that have no effect here.
    cache_control: Any = None
    context_management: Any = None
    service_tier: Any = None
    speed: Any = None
    inference_geo: Any = None
    diagnostics: Any = None
    user_profile_id: Any = None
    anthropic_version: Any = None

    # Extensions, as for OpenAI's endpoints.
    seed: int | None = None
    """The same seed gives the same text, whatever other requests are running."""
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Values for the model's chat template."""
    cache_salt: str | None = None
    """Prefixes are found only by requests of the same tenant with the same salt."""
    speculation: str | None = None
    """Pilotfish's own: "auto", "off" or a drafter; null: the server's default. Never changes the text."""

    @property
    def user(self) -> str | None:
        """The user in the metadata."""
        user = self.metadata.get("user_id") if isinstance(self.metadata, dict) else None
        return user if isinstance(user, str) else None


class MessagesRequest(ConversationRequest):
    max_tokens: Annotated[int, Field(ge=0)]
    """0: only put the prompt into the cache."""


class CountTokensRequest(ConversationRequest):
    """What is not part of the prompt has no effect."""

    max_tokens: Any = None
