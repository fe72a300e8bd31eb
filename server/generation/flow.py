"""The flow of a request that generates text, and `Endpoint`, the interface of the endpoints that use it.

An endpoint consists of a request type, response types and an adapter to this flow (see `server.routes.chat`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from pilotfish.engine.params import Thinking
from pilotfish.engine.request import EngineInfo, check_request, fan_out
from pilotfish.engine.request import Request as EngineRequest
from pilotfish.server.admission import Flow
from pilotfish.server.encoding import ErrorBody, json_response
from pilotfish.server.errors import OVER_LIMIT, ApiError, ErrorForm, bad_parameter, openai_error
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.events import DONE, Chunks, ClientGoneError, EventStream, until_disconnect
from pilotfish.server.generation.facts import GenerationFacts, RequestFacts, facts_of
from pilotfish.server.generation.follow import Pieces, follow_all
from pilotfish.server.generation.spec import GenerationSpec, fit
from pilotfish.server.generation.usage import timings_of, usage_of
from pilotfish.server.offload import MANY_IDS
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.protocol.common import ApiModel, Prompt
from pilotfish.server.protocol.unknown import unknown_fields
from pilotfish.server.protocol.usage import Timings, Usage
from pilotfish.server.quotas import Quota
from pilotfish.server.service import Service, check_length
from pilotfish.server.tenants import prefix_salt
from pilotfish.text.detokenizer import AnswerText, Detokenizer, Piece, Vocabulary
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.message import MessageParser
from pilotfish.text.offsets import token_offsets

MAX_SEQUENCES = 4096
"""Answers that one request may ask for, prompts times n."""

Body = TypeVar("Body", bound=ApiModel)


@dataclass(frozen=True, slots=True)
class Reply(Generic[Body]):
    """A response in the making: the request and its answers."""

    body: Body
    spec: GenerationSpec
    answers: Sequence[Answer]
    vocabulary: Vocabulary
    id: str
    created: int
    """Seconds since 1970."""
    fingerprint: str
    service: Service
    tenant: str

    def head(self, object_: str) -> tuple[str, str, int, str, str]:
        """Return the fields of `protocol.usage.Response`."""
        return self.id, object_, self.created, self.spec.model, self.fingerprint

    def usage(self) -> Usage:
        return usage_of(self.answers)

    def timings(self) -> Timings:
        return timings_of(self.answers)

    @property
    def service_tier(self) -> str | UnsetType:
        """OpenAI's service_tier of the answer, if the request has one: there is a single tier."""
        return UNSET if getattr(self.body, "service_tier", None) is None else "default"


class Endpoint(ABC, Generic[Body]):
    """An endpoint that generates text."""

    name: ClassVar[str]
    path: ClassVar[str]
    request_type: ClassVar[type[Any]]
    response_type: ClassVar[type[msgspec.Struct]]
    id_prefix: ClassVar[str]
    operation: ClassVar[str]
    """OpenTelemetry's gen_ai.operation.name."""
    prompt_param: ClassVar[str]
    """The name of the prompt's field, for errors."""
    end_of_stream: ClassVar[bytes] = DONE
    ping: ClassVar[bytes] = b""
    """An event that means nothing, to be sent from time to time; b"": none."""
    error_form: ErrorForm = staticmethod(openai_error)
    error_type: ClassVar[type[msgspec.Struct]] = ErrorBody
    """What `error_form` returns."""

    @abstractmethod
    def spec(self, body: Body) -> GenerationSpec:
        """Translate a request, except for its prompts. Raises ApiError 400 for fields that contradict each other."""

    async def recall(self, body: Body, service: Service, tenant: str) -> None:
        """Look up what the request refers to. Raises ApiError 404."""
        return

    @abstractmethod
    async def prompts(self, body: Body, service: Service) -> Sequence[Prompt] | Conversation:
        """Return the request's `spec.prompts` prompts, each as text or as token ids; or the conversation that is to be
        answered. Raises ApiError 400."""

    @abstractmethod
    def whole(self, reply: Reply[Body], pieces: Sequence[Piece]) -> msgspec.Struct:
        """Return the response of a request that is not streamed. `pieces` are the whole answers, in the order of
        `reply.answers`."""

    @abstractmethod
    def chunks(self, reply: Reply[Body]) -> Chunks:
        """Return the object that makes the events of a streamed response."""


async def generate(endpoint: Endpoint[Body], body: Body, request: Request, service: Service) -> Response:
    """Answer a request. Raises ApiError and the engine's errors until a stream begins."""
    info = service.ready()
    facts = facts_of(request.scope)
    facts.ignored = unknown_fields(body, service.config.strict_requests)
    spec = endpoint.spec(body)
    service.check_model(spec.model)
    identity = f"{endpoint.id_prefix}{uuid.uuid4().hex}"
    with ExitStack() as admission:
        if spec.sequences > MAX_SEQUENCES:
            param = "n" if spec.answers > 1 else endpoint.prompt_param
            message = f"the request asks for {spec.sequences} answers, but may ask for at most {MAX_SEQUENCES}"
            raise bad_parameter(param, message)
        quota = admission.enter_context(_quota(service, facts, spec.sequences, answers := list[Answer]()))
        weight = 1.0 if facts.key is None else facts.key.limits.weight
        who = Flow(facts.tenant, spec.user or _address(request), weight)
        admitted = admission.enter_context(
            service.gate.admit(spec.sequences, service.limits(info, _deadline(spec, facts)), who)
        )
        if spec.bad_words:
            words = await service.word_tokens(spec.bad_words)
            spec = replace(spec, params=msgspec.structs.replace(spec.params, bad_words=words))
        await endpoint.recall(body, service, facts.tenant)
        spec, prompts, parser = await _prepare(service, info, spec, await endpoint.prompts(body, service))
        for i, prompt in enumerate(prompts):
            name = identity if spec.prompts == 1 else f"{identity}-{i}"
            if i:
                await asyncio.sleep(0)  # thousands of short texts are as much work as a long one
            asked = await _ask(service, info, spec, endpoint.prompt_param, prompt, name, facts, who)
            tokens = (len(asked.prompt_ids) + asked.params.max_tokens) * spec.answers
            admitted.claim(tokens)
            quota.claim(tokens)
            seed = service.engine.draw_seed() if asked.params.seed is None else asked.params.seed
            for one in fan_out(asked, spec.answers, seed):
                shown = frozenset[int]() if parser is None else service.format.shown
                work = (service.vocabulary, spec, prompt, one, shown)
                long = spec.echo and len(one.prompt_ids) >= MANY_IDS
                text, echo, offsets = await service.offload.run(_text, *work) if long else _text(*work)
                own = None if parser is None else parser()
                answers.append(Answer(len(answers), i, spec, one, text, own, echo, offsets))
        reply = Reply(
            body,
            spec,
            answers,
            service.vocabulary,
            identity,
            int(time.time()),
            service.fingerprint(info),
            service,
            facts.tenant,
        )
        facts.generation = GenerationFacts(
            identity, endpoint.operation, spec, answers, await _prompts(service, answers)
        )
        pieces = follow_all(service.engine, answers, service.metrics, admitted.at_once)
        if spec.stream:
            chunks, end = endpoint.chunks(reply), endpoint.end_of_stream
            return EventStream(chunks, pieces, admission.pop_all(), end, endpoint.ping)
        try:
            whole = await until_disconnect(request.receive, _collect(answers, pieces))
        except ClientGoneError:
            return Response(status_code=499)
    return json_response(endpoint.whole(reply, whole))


async def _prepare(
    service: Service, info: EngineInfo, spec: GenerationSpec, asked: Sequence[Prompt] | Conversation
) -> tuple[GenerationSpec, Sequence[Prompt], Callable[[], MessageParser] | None]:
    """Return the spec with the grammar of its answers, the prompts, and what makes a parser for each answer to a
    conversation. Raises ApiError 400 and ParameterError."""
    if not isinstance(asked, Conversation):
        grammar = None if spec.output is None else await service.grammars.of_output(spec.output, info)
        return _restricted(spec, grammar, None), asked, None
    form = service.format if asked.parse else service.format.plain()
    rendered = await service.render(asked, form)
    grammar = await service.grammars.of_conversation(asked, form, spec.output, rendered.in_reasoning, info)
    thinking = None
    if asked.thinking_budget is not None and form.reasoning is not None:
        begin, end = [await service.encode(marker, "thinking", False) for marker in form.reasoning]
        thinking = Thinking(
            budget=asked.thinking_budget,
            end=end,
            begin=() if rendered.in_reasoning else begin,
            again=begin if form.thinks_again else (),
        )
    if form.ends and not spec.params.ignore_eos:
        ends = (*spec.params.stop_token_ids, *form.ends)
        spec = replace(spec, params=msgspec.structs.replace(spec.params, stop_token_ids=ends))
    tools = asked.tools if asked.tool_choice != "none" else ()
    parser = partial(form.parser, tools, in_reasoning=rendered.in_reasoning, begun=asked.continue_final_message)
    return _restricted(spec, grammar, thinking), [rendered.text], parser


def _restricted(spec: GenerationSpec, grammar: Grammar | None, thinking: Thinking | None) -> GenerationSpec:
    if grammar is None and thinking is None:
        return spec
    return replace(spec, params=msgspec.structs.replace(spec.params, grammar=grammar, thinking=thinking))


async def _ask(
    service: Service,
    info: EngineInfo,
    spec: GenerationSpec,
    param: str,
    prompt: Prompt,
    name: str,
    facts: RequestFacts,
    who: Flow,
) -> EngineRequest:
    """Make and check the engine's request for one prompt, which the client sent as `param`."""
    if isinstance(prompt, str):
        ids = await service.encode(prompt, param, spec.add_special_tokens, info) or service.tokenizer.document_start
    else:
        check_length(param, len(prompt), info)
        ids = tuple(prompt)
    check_length(param, len(ids), info)
    asked = EngineRequest(
        id=name,
        prompt_ids=ids,
        params=fit(spec, len(ids), info),
        speculation=spec.speculation,
        prediction_ids=await service.encode(spec.prediction, "prediction", False) if spec.prediction else (),
        adapter=service.adapter_of(spec.model),
        salt=prefix_salt(facts.tenant, spec.cache_salt),
        session=facts.session,
        tenant=who.tenant,
        weight=who.weight,
        user=who.user,
        priority=spec.priority,
        deadline=_deadline(spec, facts),
        arrival=facts.arrival,
    )
    check_request(asked, info)
    return asked


@contextmanager
def _quota(service: Service, facts: RequestFacts, sequences: int, answers: Sequence[Answer]) -> Iterator[Quota]:
    """Admit a request by its tenant's limits, and count what its answers have come to at the end."""
    name = None if facts.key is None else facts.key.name
    try:
        with service.quotas.admit(facts.key, sequences) as quota:
            try:
                yield quota
            finally:
                begun = [answer for answer in answers if answer.outcome is not None]
                prompt, generated = sum(len(a.request.prompt_ids) for a in begun), sum(a.tokens for a in begun)
                quota.used = prompt + generated
                if begun:
                    service.metrics.tenant_used(name, prompt, generated)
    except ApiError as error:
        if error.code == OVER_LIMIT:
            service.metrics.tenant_limited(name)
        raise


def _deadline(spec: GenerationSpec, facts: RequestFacts) -> float:
    return 0.0 if spec.timeout is None else facts.arrival + spec.timeout


def _address(request: Request) -> str:
    """Return the client's address, which stands for a user."""
    return "" if request.client is None else request.client.host


def _text(
    vocabulary: Vocabulary, spec: GenerationSpec, prompt: Prompt, asked: EngineRequest, shown: frozenset[int]
) -> tuple[AnswerText, str, Sequence[int]]:
    """Return the empty text of an answer, the prompt to echo before it, and the offsets of the prompt's tokens.

    A prompt of ids may end within a character, which the answer then completes. A prompt of text is echoed as it was
    sent, however it was tokenized.
    """
    marks = vocabulary.marks(spec.stop) if spec.skip_special_tokens else {}
    marks = {id_: mark for id_, mark in marks.items() if id_ not in shown}  # these are spelled out
    detokenizer = Detokenizer(vocabulary, spec.skip_special_tokens, marks, shown)
    echo, offsets = "", list[int]()
    if spec.echo:
        if isinstance(prompt, str):
            echo, offsets = prompt, token_offsets(prompt, asked.prompt_ids, vocabulary)
        else:
            parts = [detokenizer.feed((id_,)) for id_ in asked.prompt_ids]
            echo, offsets = "".join(parts), list(accumulate(map(len, parts[:-1]), initial=0))
    text = AnswerText(
        detokenizer,
        spec.stop,
        include_stop=spec.include_stop,
        min_tokens=asked.params.min_tokens,
        offset=len(echo),
        marks={vocabulary.bytes_of(id_).decode("utf-8", "replace"): mark for id_, mark in marks.items()},
    )
    return text, echo, offsets


async def _prompts(service: Service, answers: Sequence[Answer]) -> list[str] | None:
    """Return the text of the prompts, if it may be logged."""
    if not service.config.log_prompts:
        return None
    prompts = {answer.prompt_index: answer.request.prompt_ids for answer in answers}.values()
    return [await service.tokenizing.decode(ids) for ids in prompts]


async def _collect(answers: Sequence[Answer], pieces: Pieces) -> list[Piece]:
    """Return the whole answers, each as one piece."""
    parts: list[list[Piece]] = [[] for _ in answers]
    async with aclosing(pieces):
        async for answer, piece in pieces:
            parts[answer.index].append(piece)
    return [
        Piece(
            "".join(piece.text for piece in own),
            [entry for piece in own for entry in piece.entries],
            own[-1].finish_reason,
            [part for piece in own for part in piece.parts],
        )
        for own in parts
    ]
