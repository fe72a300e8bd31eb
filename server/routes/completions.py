"""POST /v1/completions."""

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
from pilotfish.server.logprobs import completion_logprobs
from pilotfish.server.protocol.common import Prompt
from pilotfish.server.protocol.completions import CompletionRequest
from pilotfish.server.protocol.responses import Completion, CompletionChoice
from pilotfish.server.sampling import check_prediction, check_streaming, sampling_params
from pilotfish.server.service import Service, ServiceDependency, check_length
from pilotfish.server.transport import ClientGoneError, EventStream, until_disconnect
from pilotfish.text.detokenizer import AnswerText, Detokenizer, TokenEntry

DEFAULT_MAX_TOKENS = 16
"""As OpenAI documents."""

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Reply:
    """What all chunks of a response have in common."""

    service: Service
    body: CompletionRequest
    answers: Sequence[Answer]
    head: dict[str, Any]


@router.post("/v1/completions", response_model=Completion)
async def create_completion(body: CompletionRequest, request: Request, service: ServiceDependency) -> Response:
    info = service.ready()
    service.check_model(body.model)
    _check(body)
    identity = f"cmpl-{uuid.uuid4().hex}"
    head = {
        "id": identity,
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": service.fingerprint(info),
    }
    each = body.best_of or body.choices
    with ExitStack() as admission:
        admission.enter_context(service.admit(len(body.prompt) * each, info, "n" if each > 1 else "prompt"))
        answers: list[Answer] = []
        for i, prompt in enumerate(body.prompt):
            name = identity if len(body.prompt) == 1 else f"{identity}-{i}"
            answers += await _answers(service, info, body, name, i, prompt, request.state.arrival)
        reply = _Reply(service, body, answers, head)
        service.note(request, identity, body, answers)
        if body.stream:
            return EventStream(_events(reply), admission.pop_all())
        try:
            completion = await until_disconnect(request.receive, _complete(reply))
        except ClientGoneError:
            return Response(status_code=499)
    return Response(msgspec.json.encode(completion), media_type="application/json")


def _check(body: CompletionRequest) -> None:
    check_streaming(body)
    check_prediction(body, len(body.prompt) * (body.best_of or body.choices))
    if body.best_of is not None and body.best_of < body.choices:
        raise bad_parameter("best_of", f"best_of ({body.best_of}) must be at least n ({body.choices})")
    if body.best_of is not None and body.best_of > body.choices and body.stream:
        raise bad_parameter("best_of", "best_of cannot be larger than n with stream: true, as it ranks whole answers")
    if body.max_tokens == 0 and not body.echo:
        raise bad_parameter("max_tokens", "max_tokens is 0, but must be at least 1 (0 only with echo: true)")


async def _answers(
    service: Service,
    info: EngineInfo,
    body: CompletionRequest,
    identity: str,
    prompt_index: int,
    prompt: Prompt,
    arrival: float,
) -> list[Answer]:
    """The answers to one prompt, best_of of them, yet to be asked of the engine."""
    if isinstance(prompt, str):
        ids = await service.encode(prompt, "prompt", body.add_special_tokens)
    else:
        ids = tuple(prompt)
    check_length("prompt", len(ids), info)
    count = body.best_of or body.choices
    ranked = count > body.choices
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(
        body,
        info,
        len(ids),
        max_tokens=max_tokens or 1,
        logprobs=0 if body.logprobs is None and ranked else body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
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
    answers = []
    for i, one in enumerate(fan_out(asked, count, seed)):
        detokenizer = Detokenizer(service.vocabulary, body.skip_special_tokens)
        echo, offsets = _echo(service, body, prompt, ids, detokenizer) if body.echo else ("", [])
        text = AnswerText(
            detokenizer,
            body.stop,
            include_stop=body.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            offset=len(echo),
        )
        answers.append(
            Answer(
                prompt_index * count + i,
                prompt_index,
                one,
                text,
                echo=echo,
                echo_offsets=offsets,
                only_echo=max_tokens == 0,
                show_logprobs=body.logprobs is not None,
            )
        )
    return answers


def _echo(
    service: Service, body: CompletionRequest, prompt: Prompt, ids: tuple[int, ...], detokenizer: Detokenizer
) -> tuple[str, list[int]]:
    """A prompt's text and where in it each token begins. A prompt of ids may end within a character: its answer then
    goes on from there, by `detokenizer`; text stays as it was sent, whatever the tokenizer makes of it."""
    spelling = Detokenizer(service.vocabulary, body.skip_special_tokens) if isinstance(prompt, str) else detokenizer
    offsets, parts, length = [], [], 0
    for id_ in ids:
        offsets.append(length)
        part = spelling.feed((id_,))
        parts.append(part)
        length += len(part)
    return prompt if isinstance(prompt, str) else "".join(parts), offsets


async def _complete(reply: _Reply) -> Completion:
    """The whole response, once all answers are there; with best_of, the likeliest of them."""
    texts: dict[int, list[str]] = {answer.index: [] for answer in reply.answers}
    entries: dict[int, list[TokenEntry]] = {answer.index: [] for answer in reply.answers}
    service, body = reply.service, reply.body
    async with aclosing(follow_all(service.engine, reply.answers, service.metrics)) as pieces:
        async for answer, piece in pieces:
            texts[answer.index].append(piece.text)
            entries[answer.index] += piece.entries
    choices: list[CompletionChoice] = []
    for prompt_index in range(len(body.prompt)):
        mine = [answer for answer in reply.answers if answer.prompt_index == prompt_index]
        if len(mine) > body.choices:
            mine.sort(key=lambda answer: answer.mean_logprob, reverse=True)
        for answer in mine[: body.choices]:
            logprobs = completion_logprobs(entries[answer.index], service.vocabulary)
            choices.append(
                {
                    "index": len(choices),
                    "text": "".join(texts[answer.index]),
                    "logprobs": None if body.logprobs is None else logprobs,
                    "finish_reason": answer.finish_reason,
                }
            )
    completion: Completion = {
        **reply.head,  # type: ignore[typeddict-item]
        "choices": choices,
        "usage": usage(reply.answers),
        "timings": timings(reply.answers),
    }
    return completion


async def _events(reply: _Reply) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream. Most of a chunk never changes, so it is written once."""
    service, body = reply.service, reply.body
    encode = msgspec.json.encode
    head = b"data: " + encode(reply.head)[:-1]
    starts = [head + b',"choices":[{"index":%d,"text":' % answer.index for answer in reply.answers]
    end = b',"usage":null}\n\n' if body.include_usage else b"}\n\n"
    unfinished = len(reply.answers)
    async with aclosing(follow_all(service.engine, reply.answers, service.metrics)) as pieces:
        async for answer, piece in pieces:
            finished = piece.finish_reason is not None
            if not (piece.text or piece.entries or finished):
                continue
            logprobs = b"null"
            if body.logprobs is not None:
                logprobs = encode(completion_logprobs(piece.entries, service.vocabulary))
            unfinished -= finished
            own_end = end
            if not unfinished and not body.include_usage:
                own_end = b',"timings":' + encode(timings(reply.answers)) + b"}\n\n"
            yield b"".join(
                (
                    starts[answer.index],
                    encode(piece.text),
                    b',"logprobs":',
                    logprobs,
                    b',"finish_reason":',
                    encode(piece.finish_reason),
                    b"}]",
                    own_end,
                )
            )
    if body.include_usage:
        account = {"choices": [], "usage": usage(reply.answers), "timings": timings(reply.answers)}
        yield head + b"," + encode(account)[1:] + b"\n\n"
