"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.logprobs import chat_logprobs
from pilotfish.server.generation.spec import GenerationSpec, spec_of
from pilotfish.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
)
from pilotfish.server.protocol.common import Prompt
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
            max_tokens_param="max_tokens" if newer is None else "max_completion_tokens",
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

    def prompts(self, body: ChatRequest, service: Service) -> Sequence[Prompt]:
        return [service.render(body.messages, variables=body.chat_template_kwargs)]

    def whole(self, reply: Reply[ChatRequest], pieces: Sequence[Piece]) -> ChatCompletion:
        choices = [
            ChatChoice(i, ChatMessage(content=piece.text), logprobs_of(reply, piece), piece.finish_reason)
            for i, piece in enumerate(pieces)
        ]
        head = reply.head("chat.completion")
        return ChatCompletion(*head, choices, reply.usage(), reply.timings(), service_tier=reply.service_tier)

    def chunks(self, reply: Reply[ChatRequest]) -> ChatChunks:
        return ChatChunks(reply, ChatChunk, "chat.completion.chunk")


class ChatChunks(OpenAIChunks[ChatRequest, ChatChunk]):
    """Makes a chunk with the role of each choice, chunks with its text, and one with its finish_reason."""

    def begin(self) -> Sequence[ChatChunk]:
        role = ChatDelta(role="assistant", content="", refusal=None)
        return [self.chunk(ChatChunkChoice(answer.index, role)) for answer in self.reply.answers]

    def add(self, answer: Answer, piece: Piece) -> Sequence[ChatChunk]:
        chunks = []
        if piece.text or piece.entries:
            delta = ChatDelta(content=piece.text)
            chunks.append(self.chunk(ChatChunkChoice(answer.index, delta, logprobs_of(self.reply, piece))))
        if piece.finish_reason is not None:
            chunks.append(self.chunk(ChatChunkChoice(answer.index, ChatDelta(), None, piece.finish_reason)))
        return chunks


def logprobs_of(reply: Reply[ChatRequest], piece: Piece) -> ChatLogprobs | None:
    return chat_logprobs(piece.entries, reply.vocabulary) if reply.body.logprobs else None
