"""POST /v1/responses, and its responses: retrieve, delete, cancel, and list the input."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.engine.params import SamplingParams
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.logprobs import chat_logprobs
from pilotfish.server.generation.spec import GenerationSpec, scheduling_of
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.protocol import responses_out as out
from pilotfish.server.protocol.chat import TokenLogprob
from pilotfish.server.protocol.responses import ResponsesRequest
from pilotfish.server.responses.conversation import check_unicode, conversation_of, items_of, listed, output_of
from pilotfish.server.responses.output import Output
from pilotfish.server.responses.store import Stored
from pilotfish.server.service import Service, ServiceDependency
from pilotfish.text.detokenizer import Piece

router = APIRouter()

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
)  # fmt: skip
"""Fields that ResponsesRequest and SamplingParams share; None stands for the default."""
_LOGPROBS = "message.output_text.logprobs"


class Responses(Endpoint[ResponsesRequest]):
    name = "create_response"
    path = "/v1/responses"
    request_type = ResponsesRequest
    response_type = out.ResponseObject
    id_prefix = "resp_"
    operation = "chat"
    prompt_param = "input"
    end_of_stream = b""

    def spec(self, body: ResponsesRequest) -> GenerationSpec:
        check_unicode(body)
        given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        if body.stream_options is not None and not body.stream:
            raise bad_parameter("stream_options", "stream_options is only allowed with stream: true")
        logprobs = (body.top_logprobs or 0) if body.top_logprobs or _LOGPROBS in body.include else None
        return GenerationSpec(
            model=body.model,
            params=SamplingParams(**given, logprobs=logprobs),
            max_tokens=body.max_output_tokens,
            names={"max_tokens": "max_output_tokens"},
            stream=bool(body.stream),
            cache_salt=body.cache_salt,
            **scheduling_of(body, body.user or body.safety_identifier),
            speculation=body.speculation,
            output=output_of(body),
        )

    async def recall(self, body: ResponsesRequest, service: Service, tenant: str) -> None:
        if body.previous_response_id is None:
            return
        stored = await service.responses.get(tenant, body.previous_response_id)
        if stored is None:
            raise _not_found(body.previous_response_id, "previous_response_id")
        body.history = stored.history

    async def prompts(self, body: ResponsesRequest, service: Service) -> Conversation:
        return conversation_of(body, body.history)

    def whole(self, reply: Reply[ResponsesRequest], pieces: Sequence[Piece]) -> out.ResponseObject:
        making = ResponseEvents(reply)
        making.begin()
        making.add(reply.answers[0], pieces[0])
        making.end()
        return making.response

    def chunks(self, reply: Reply[ResponsesRequest]) -> ResponseEvents:
        return ResponseEvents(reply)


class ResponseEvents:
    """Makes the events of a streamed response, and the response that they add up to."""

    def __init__(self, reply: Reply[ResponsesRequest]) -> None:
        self._reply = reply
        self._output = Output()
        self.response = _response(reply)

    def begin(self) -> Sequence[msgspec.Struct]:
        begun = msgspec.structs.replace(self.response, output=[])
        return [
            out.Created(sequence_number=self._output.number(), response=begun),
            out.InProgress(sequence_number=self._output.number(), response=begun),
        ]

    def add(self, answer: Answer, piece: Piece) -> Sequence[msgspec.Struct]:
        return self._output.add(piece.parts, self._logprobs(piece))

    def end(self) -> Sequence[msgspec.Struct]:
        reply, response = self._reply, self.response
        cut = reply.answers[0].finish_reason == "length"
        response.status = "incomplete" if cut else "completed"
        events = self._output.end(response.status)
        response.output = self._output.items
        response.usage, response.timings = _usage(reply), reply.timings()
        if cut:
            response.incomplete_details = out.IncompleteDetails("max_output_tokens")
        else:
            response.completed_at = int(time.time())
        if response.store:
            own = items_of(reply.body)
            items = [*reply.body.history, *map(listed, own)]
            reply.service.responses.put(reply.tenant, response, items, len(own))
        last = out.Incomplete if cut else out.Completed
        return [*events, last(sequence_number=self._output.number(), response=response)]

    def _logprobs(self, piece: Piece) -> Sequence[TokenLogprob]:
        if self._reply.spec.params.logprobs is None or _LOGPROBS not in self._reply.body.include:
            return ()
        return chat_logprobs(piece.entries, self._reply.vocabulary).content


def _response(reply: Reply[ResponsesRequest]) -> out.ResponseObject:
    body = reply.body
    form = None if body.text is None else body.text.format
    effort = None if body.reasoning is None else body.reasoning.effort
    summary = None if body.reasoning is None else body.reasoning.summary
    return out.ResponseObject(
        id=reply.id,
        created_at=reply.created,
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=reply.spec.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": effort, "summary": summary},
        store=body.store is not False and reply.service.responses.enabled,
        temperature=reply.spec.params.temperature,
        text={"format": form or {"type": "text"}, "verbosity": "medium"},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=[{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=reply.spec.params.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
        metadata=body.metadata or {},
    )


def _usage(reply: Reply[ResponsesRequest]) -> out.ResponseUsage:
    usage = reply.usage()
    return out.ResponseUsage(
        usage.prompt_tokens,
        out.InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        out.OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
    )


@router.get("/v1/responses/{response_id}", **returns(out.ResponseObject))
async def retrieve_response(response_id: str, request: Request, service: ServiceDependency) -> Response:
    """Return a stored response."""
    if request.query_params.get("stream") in ("true", "1"):
        raise bad_parameter("stream", "stream is not supported here: only background responses could be followed")
    return json_response((await _stored(response_id, request, service)).response)


@router.delete("/v1/responses/{response_id}", **returns(out.DeletedResponse))
async def delete_response(response_id: str, request: Request, service: ServiceDependency) -> Response:
    if not await service.responses.delete(facts_of(request.scope).tenant, response_id):
        raise _not_found(response_id, "response_id")
    return json_response(out.DeletedResponse(response_id))


@router.post("/v1/responses/{response_id}/cancel", **returns(out.ResponseObject))
async def cancel_response(response_id: str, request: Request, service: ServiceDependency) -> Response:
    """Refuse: what is stored is done. A client cancels a running response by closing its connection."""
    await _stored(response_id, request, service)
    raise bad_parameter(
        "response_id", "Only background responses can be cancelled; this one is done. Close the connection instead."
    )


@router.get("/v1/responses/{response_id}/input_items", **returns(out.InputItems))
async def list_input_items(response_id: str, request: Request, service: ServiceDependency) -> Response:
    """Return the items of a response's own input, newest first unless order=asc."""
    stored = await _stored(response_id, request, service)
    items = stored.items[len(stored.items) - stored.own :]
    query = request.query_params
    if query.get("order", "desc") != "asc":
        items = items[::-1]
    after = query.get("after")
    ids = [item["id"] for item in items]
    if after is not None:
        if after not in ids:
            raise bad_parameter("after", f"after is {after!r}, but there is no such item")
        items = items[ids.index(after) + 1 :]
    limit = query.get("limit", "20")
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= 100:
        raise bad_parameter("limit", f"limit is {limit[:20]!r}, but must be between 1 and 100")
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return json_response(out.InputItems(page, first, last, len(page) < len(items)))


async def _stored(response_id: str, request: Request, service: Service) -> Stored:
    stored = await service.responses.get(facts_of(request.scope).tenant, response_id)
    if stored is None:
        raise _not_found(response_id, "response_id")
    return stored


def _not_found(id: str, param: str) -> ApiError:
    return ApiError(
        404,
        f"Response with id {id[:100]!r} not found. Responses are kept by the server that made them, for "
        "a while, if they were stored: of several replicas another one may have it.",
        param=param,
        code="response_not_found",
    )
