"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from pilotfish.server.chat.conversation import conversation_of
from pilotfish.server.chat.message import deltas_of, finish_reason, message_of
from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.logprobs import chat_logprobs
from pilotfish.server.generation.provenance import provenance_of
from pilotfish.server.generation.spec import GenerationSpec, spec_of
from pilotfish.server.offload import MANY_MESSAGES
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
)
from pilotfish.server.protocol.usage import TokenOrigin
from pilotfish.server.routes.openai import OpenAIChunks
from pilotfish.server.service import Service
from pilotfish.text.detokenizer import Piece


class Chat(Endpoint[ChatRequest]):
    name = "create_chat_completion"
    path = "/v1/chat/completions"
    request_type = ChatRequest
    response_type = ChatCompletion
    id_prefix = "chatcmpl-"
    operation = "chat"
    prompt_param = "messages"

    def spec(self, body: ChatRequest) -> GenerationSpec:
        newer = body.max_completion_tokens
        spec = spec_of(
            body,
            max_tokens=body.max_tokens if newer is None else newer,
            names={} if newer is None else {"max_tokens": "max_completion_tokens"},
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        if body.top_logprobs and not body.logprobs:
            raise bad_parameter("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        if None not in (body.max_tokens, newer) and body.max_tokens != newer:
            raise bad_parameter(
                "max_tokens",
                "max_tokens and max_completion_tokens mean the same: give one of them (the latter is the newer)",
            )
        return spec

    async def prompts(self, body: ChatRequest, service: Service) -> Conversation:
        if len(body.messages) < MANY_MESSAGES:
            return conversation_of(body)
        return await service.offload.run(conversation_of, body)

    def whole(self, reply: Reply[ChatRequest], pieces: Sequence[Piece]) -> ChatCompletion:
        choices = []
        for i, piece in enumerate(pieces):
            message = message_of(piece.parts, reply.body)
            reason = finish_reason(piece.finish_reason, piece.parts, reply.body)
            choices.append(ChatChoice(i, message, logprobs_of(reply, piece), reason, origins_in(reply, piece)))
        head = reply.head("chat.completion")
        return ChatCompletion(*head, choices, reply.usage(), reply.timings(), service_tier=reply.service_tier)

    def chunks(self, reply: Reply[ChatRequest]) -> ChatChunks:
        return ChatChunks(reply, ChatChunk, "chat.completion.chunk")


class ChatChunks(OpenAIChunks[ChatRequest, ChatChunk]):
    """Makes a chunk with the role of each choice, chunks with its parts, and one with its finish_reason."""

    def __init__(self, reply: Reply[ChatRequest], chunk_type: type[ChatChunk], object_: str) -> None:
        super().__init__(reply, chunk_type, object_)
        self._called: set[int] = set()

    def begin(self) -> Sequence[ChatChunk]:
        role = ChatDelta(role="assistant", content="", refusal=None)
        return [self.chunk(ChatChunkChoice(answer.index, role)) for answer in self.reply.answers]

    def add(self, answer: Answer, piece: Piece) -> Sequence[ChatChunk]:
        chunks = []
        logprobs, origins = logprobs_of(self.reply, piece), origins_in(self.reply, piece)
        deltas = deltas_of(piece.parts, self.reply.body)
        if piece.entries and not deltas:
            deltas = [ChatDelta(content="")]  # tokens whose text is held back, or not shown
        for delta in deltas:
            chunks.append(self.chunk(ChatChunkChoice(answer.index, delta, logprobs, None, origins)))
            logprobs, origins = None, UNSET
            if delta.tool_calls is not UNSET or delta.function_call is not UNSET:
                self._called.add(answer.index)
        if piece.finish_reason is not None:
            reason = finish_reason(piece.finish_reason, piece.parts, self.reply.body, answer.index in self._called)
            chunks.append(self.chunk(ChatChunkChoice(answer.index, ChatDelta(), None, reason)))
        return chunks


def logprobs_of(reply: Reply[ChatRequest], piece: Piece) -> ChatLogprobs | None:
    return chat_logprobs(piece.entries, reply.vocabulary) if reply.body.logprobs else None


def origins_in(reply: Reply[ChatRequest], piece: Piece) -> list[TokenOrigin] | UnsetType:
    return provenance_of(piece.entries, reply.vocabulary) if reply.spec.provenance else UNSET
