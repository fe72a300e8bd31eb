"""Request of POST /v1/responses, OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, PrivateAttr

from pilotfish.errors import shown
from pilotfish.server.protocol.chat import MAX_TOP_LOGPROBS, Budget
from pilotfish.server.protocol.common import ApiModel, SchedulingFields, Unsupported, only, wrong
from pilotfish.server.protocol.foreign import Foreign
from pilotfish.server.protocol.responses_foreign import RESPONSES_FOREIGN


def _input(value: Any) -> str | list[dict[str, Any]]:
    """Check that the input is text, or a list of items."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise wrong("must be a string or a list of items, which are objects")
    return value


def _include(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    known = ("message.output_text.logprobs", "reasoning.encrypted_content")
    if not isinstance(value, list) or not all(each in known for each in value):
        raise wrong(f"is {shown(value)}, but may have only {' and '.join(map(repr, known))}")
    return tuple(value)


Include = Annotated[tuple[str, ...], PlainValidator(_include, json_schema_input_type=list[str] | None)]
_ONLY_AUTO_OR_DISABLED = 'must be "disabled" or "auto": an input that is too long is refused'


class ReasoningParam(ApiModel):
    effort: str | None = None
    summary: Any = None
    """Accepted without effect: reasoning comes whole, so there is nothing to summarize."""
    generate_summary: Any = None


class TextParam(ApiModel):
    format: dict[str, Any] | None = None
    verbosity: Annotated[Any, only("medium", otherwise='must be "medium" or left out')] = None


class ResponsesRequest(SchedulingFields):
    foreign: ClassVar[Mapping[str, Foreign]] = RESPONSES_FOREIGN

    model: str
    input: Annotated[Any, PlainValidator(_input, json_schema_input_type=str | list[dict[str, Any]])]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextParam | None = None
    reasoning: ReasoningParam | None = None
    include: Include = ()
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    previous_response_id: str | None = None
    store: bool | None = None
    """Whether the response can be retrieved, and gone on with; true by default."""
    metadata: dict[str, str] | None = None
    truncation: Annotated[Any, only("disabled", "auto", otherwise=_ONLY_AUTO_OR_DISABLED)] = None
    user: str | None = None

    # OpenAI's fields that have no effect here.
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None

    background: Annotated[Any, only(False, otherwise="is not supported: this server answers while you wait")] = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None

    # Extensions, as in chat.
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: Budget = None
    cache_salt: str | None = None
    speculation: str | None = None

    _history: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The items that the request goes on from: of the previous response, once it is looked up."""
        return self._history

    @history.setter
    def history(self, items: list[dict[str, Any]]) -> None:
        self._history = items
