"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.engine.request import EngineInfo, check_request, fan_out
from pilotfish.engine.request import Request as EngineRequest
from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation import Answer, follow_all, timings, usage
from pilotfish.server.logprobs import chat_logprobs
from pilotfish.server.protocol.chat import ChatRequest
from pilotfish.server.protocol.responses import ChatChoice, ChatCompletion
from pilotfish.server.sampling import check_prediction, check_streaming, sampling_params
from pilotfish.server.service import Service, ServiceDependency, check_length
from pilotfish.server.transport import ClientGoneError, EventStream, until_disconnect
from pilotfish.text.detokenizer import AnswerText, Detokenizer, TokenEntry

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Reply:
    """What all chunks of a response have in common."""

    service: Service
    body: ChatRequest
    answers: Sequence[Answer]
    identity: str
    created: int
    fingerprint: str

    def head(self, object_: str) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": object_,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request, service: ServiceDependency) -> Response:
    info = service.ready()
    service.check_model(body.model)
    _check(body)
    identity = f"chatcmpl-{uuid.uuid4().hex}"
    with ExitStack() as admission:
        admission.enter_context(service.admit(body.choices, info, "n"))
        answers = await _answers(service, info, body, identity, request.state.arrival)
        reply = _Reply(service, body, answers, identity, int(time.time()), service.fingerprint(info))
        service.note(request, identity, body, answers)
        if body.stream:
            return EventStream(_events(reply), admission.pop_all())
        try:
            completion = await until_disconnect(request.receive, _complete(reply))
        except ClientGoneError:
            return Response(status_code=499)
    return Response(msgspec.json.encode(completion), media_type="application/json")


def _check(body: ChatRequest) -> None:
    check_streaming(body)
    check_prediction(body, body.choices)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_parameter("top_logprobs", "top_logprobs is only allowed with logprobs: true")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_parameter(
            "max_tokens",
            "max_tokens and max_completion_tokens mean the same: give one of them (the latter is the newer)",
        )


async def _answers(
    service: Service, info: EngineInfo, body: ChatRequest, identity: str, arrival: float
) -> list[Answer]:
    """The answers to the conversation, yet to be asked of the engine."""
    prompt = service.render(body.messages, variables=body.chat_template_kwargs)
    ids = await service.encode(prompt, "messages", add_special_tokens=False)
    check_length("messages", len(ids), info)
    params = sampling_params(
        body,
        info,
        len(ids),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        max_tokens_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    asked = EngineRequest(
        id=identity,
        prompt_ids=ids,
        params=params,
        speculation=body.speculation,
        prediction_ids=await service.prediction(body.prediction),
        arrival=arrival,
    )
    check_request(asked, info)
    seed = params.seed if params.seed is not None else service.engine.draw_seed()
    return [
        Answer(i, 0, one, _text(service, body, params.min_tokens))
        for i, one in enumerate(fan_out(asked, body.choices, seed))
    ]


def _text(service: Service, body: ChatRequest, min_tokens: int) -> AnswerText:
    return AnswerText(
        Detokenizer(service.vocabulary, body.skip_special_tokens),
        body.stop,
        include_stop=body.include_stop_str_in_output,
        min_tokens=min_tokens,
    )


async def _complete(reply: _Reply) -> ChatCompletion:
    """The whole response, once all answers are there."""
    texts: list[list[str]] = [[] for _ in reply.answers]
    entries: list[list[TokenEntry]] = [[] for _ in reply.answers]
    service = reply.service
    async with aclosing(follow_all(service.engine, reply.answers, service.metrics)) as pieces:
        async for answer, piece in pieces:
            texts[answer.index].append(piece.text)
            entries[answer.index] += piece.entries
    choices: list[ChatChoice] = [
        {
            "index": answer.index,
            "message": {"role": "assistant", "content": "".join(texts[answer.index]), "refusal": None},
            "logprobs": chat_logprobs(entries[answer.index], service.vocabulary) if reply.body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for answer in reply.answers
    ]
    completion: ChatCompletion = {
        **reply.head("chat.completion"),  # type: ignore[typeddict-item]
        "choices": choices,
        "usage": usage(reply.answers),
        "timings": timings(reply.answers),
    }
    return completion


async def _events(reply: _Reply) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream: for each choice one with its role, those with its text, and one with its finish_reason.

    Most of a chunk never changes, so it is written once.
    """
    service, body = reply.service, reply.body
    encode = msgspec.json.encode
    head = b"data: " + encode(reply.head("chat.completion.chunk"))[:-1]
    starts = [head + b',"choices":[{"index":%d,"delta":{' % answer.index for answer in reply.answers]
    end = b',"usage":null}\n\n' if body.include_usage else b"}\n\n"
    for start in starts:
        role = b'"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}]'
        yield start + role + end
    unfinished = len(reply.answers)
    async with aclosing(follow_all(service.engine, reply.answers, service.metrics)) as pieces:
        async for answer, piece in pieces:
            if piece.text or piece.entries:
                logprobs = b"null"
                if body.logprobs:
                    logprobs = encode(chat_logprobs(piece.entries, service.vocabulary))
                content = (b'"content":', encode(piece.text), b'},"logprobs":', logprobs, b',"finish_reason":null}]')
                yield b"".join((starts[answer.index], *content, end))
            if piece.finish_reason is not None:
                unfinished -= 1
                own_end = end
                if not unfinished and not body.include_usage:
                    own_end = b',"timings":' + encode(timings(reply.answers)) + b"}\n\n"
                finish = b'},"logprobs":null,"finish_reason":' + encode(piece.finish_reason) + b"}]"
                yield starts[answer.index] + finish + own_end
    if body.include_usage:
        account = {"choices": [], "usage": usage(reply.answers), "timings": timings(reply.answers)}
        yield head + b"," + encode(account)[1:] + b"\n\n"
