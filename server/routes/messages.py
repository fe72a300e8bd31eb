"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.engine.params import SamplingParams
from pilotfish.server.bodies import BodyRoute
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.events import event
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.spec import GenerationSpec, scheduling_of
from pilotfish.server.messages.blocks import BlockEvents, content_of
from pilotfish.server.messages.conversation import conversation_of
from pilotfish.server.messages.errors import anthropic_error
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.protocol.messages import CountTokensRequest, MessagesRequest
from pilotfish.server.protocol.messages_out import (
    ContentBlock,
    Message,
    MessageDelta,
    MessagesError,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    StopFields,
    TokenCount,
    ToolUseBlock,
)
from pilotfish.server.protocol.unknown import unknown_fields
from pilotfish.server.service import Service, ServiceDependency
from pilotfish.text.detokenizer import Piece
from pilotfish.text.grammar.output_format import OutputFormat

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
)  # fmt: skip
"""Fields that MessagesRequest and SamplingParams share; None stands for the default."""


class Messages(Endpoint[MessagesRequest]):
    name = "create_message"
    path = "/v1/messages"
    request_type = MessagesRequest
    response_type = Message
    id_prefix = "msg_"
    operation = "chat"
    prompt_param = "messages"
    end_of_stream = b""
    ping = event(Ping())
    error_form = staticmethod(anthropic_error)
    error_type = MessagesError

    def spec(self, body: MessagesRequest) -> GenerationSpec:
        given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        return GenerationSpec(
            model=body.model,
            params=SamplingParams(**given),
            max_tokens=body.max_tokens or 1,  # computing the prompt needs a step of the engine
            only_echo=body.max_tokens == 0,
            stream=bool(body.stream),
            stop=body.stop_sequences,
            cache_salt=body.cache_salt,
            **scheduling_of(body, body.user),
            speculation=body.speculation,
            output=_output(body),
        )

    async def prompts(self, body: MessagesRequest, service: Service) -> Conversation:
        conversation = conversation_of(body)
        if conversation.continue_final_message and (form := _output(body)) is not None:
            message = f"{form.place} demands the form of a whole answer, but messages ends with the beginning of one"
            raise bad_parameter(form.place, message)
        return conversation

    def whole(self, reply: Reply[MessagesRequest], pieces: Sequence[Piece]) -> Message:
        (answer,), (piece,) = reply.answers, pieces
        content = content_of(piece.parts, _shows_thinking(reply))
        stop = _stop(reply, answer, calls=any(isinstance(block, ToolUseBlock) for block in content))
        message = _message(reply, content)
        message.stop_reason, message.stop_sequence, message.timings = (
            stop.stop_reason,
            stop.stop_sequence,
            reply.timings(),
        )
        return message

    def chunks(self, reply: Reply[MessagesRequest]) -> MessageEvents:
        return MessageEvents(reply)


router = APIRouter(route_class=BodyRoute)


@router.post(f"{Messages.path}/count_tokens", **returns(TokenCount, MessagesError))
async def count_message_tokens(body: CountTokensRequest, request: Request, service: ServiceDependency) -> Response:
    """Return the number of tokens that /v1/messages would send to the model."""
    service.ready()
    facts_of(request.scope).ignored = unknown_fields(body, service.config.strict_requests)
    service.check_model(body.model)
    rendered = await service.render(conversation_of(body), service.format)
    return json_response(TokenCount(len(await service.encode(rendered.text, Messages.prompt_param, False))))


class MessageEvents:
    """Makes the events of a streamed message."""

    def __init__(self, reply: Reply[MessagesRequest]) -> None:
        self._reply = reply
        self._blocks = BlockEvents(_shows_thinking(reply))

    def begin(self) -> Sequence[msgspec.Struct]:
        return [MessageStart(_message(self._reply, ())), Ping()]

    def add(self, answer: Answer, piece: Piece) -> Sequence[msgspec.Struct]:
        return self._blocks.add(piece.parts)

    def end(self) -> Sequence[msgspec.Struct]:
        reply = self._reply
        stop = _stop(reply, reply.answers[0], calls=self._blocks.calls > 0)
        return [*self._blocks.end(), MessageDelta(stop, _usage(reply), reply.timings()), MessageStop()]


def _message(reply: Reply[MessagesRequest], content: Sequence[ContentBlock]) -> Message:
    usage = _usage(reply)
    usage.service_tier = "standard"
    return Message(id=reply.id, model=reply.spec.model, content=content, usage=usage)


def _usage(reply: Reply[MessagesRequest]) -> MessageUsage:
    usage = reply.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
    )


def _stop(reply: Reply[MessagesRequest], answer: Answer, calls: bool) -> StopFields:
    """Return why an answer ended. Calls that are cut off are no calls to run."""
    if answer.text.stopped_by is not None:
        return StopFields("stop_sequence", answer.text.stopped_by)
    if answer.finish_reason == "length":
        cut = answer.request.params.max_tokens < reply.body.max_tokens
        return StopFields("model_context_window_exceeded" if cut else "max_tokens", None)
    return StopFields("tool_use" if calls else "end_turn", None)


def _shows_thinking(reply: Reply[MessagesRequest]) -> bool:
    thinking = reply.body.thinking
    return thinking is None or thinking.display != "omitted"


def _output(body: MessagesRequest) -> OutputFormat | None:
    """Return the form that the answer must have. Raises ApiError 400 if there are two."""
    form = None if body.output_config is None else body.output_config.format
    if body.output_format is None:
        return None if form is None else OutputFormat("json_schema", form.schema_, "output_config.format.schema")
    if form is not None:
        raise bad_parameter("output_format", "output_format is the older place of output_config.format: give only one")
    return OutputFormat("json_schema", body.output_format.schema_, "output_format.schema")
