"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.logprobs import completion_logprobs
from pilotfish.server.generation.provenance import provenance_of
from pilotfish.server.generation.spec import GenerationSpec, spec_of
from pilotfish.server.protocol.common import Prompt
from pilotfish.server.protocol.completions import Completion, CompletionChoice, CompletionChunk, CompletionRequest
from pilotfish.server.routes.openai import OpenAIChunks
from pilotfish.server.service import Service
from pilotfish.text.detokenizer import Piece

DEFAULT_MAX_TOKENS = 16
"""OpenAI's documented default."""


class Completions(Endpoint[CompletionRequest]):
    name = "create_completion"
    path = "/v1/completions"
    request_type = CompletionRequest
    response_type = Completion
    id_prefix = "cmpl-"
    operation = "text_completion"
    prompt_param = "prompt"

    def spec(self, body: CompletionRequest) -> GenerationSpec:
        answers = body.best_of or body.choices
        ranked = answers > body.choices
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        spec = spec_of(
            body,
            prompts=len(body.prompt),
            answers=answers,
            max_tokens=max_tokens or 1,  # the prompt's log-probabilities need a step of the engine
            logprobs=0 if body.logprobs is None and ranked else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            add_special_tokens=body.add_special_tokens is not False,
            echo=bool(body.echo),
            only_echo=max_tokens == 0,
            show_logprobs=body.logprobs is not None,
        )
        if body.best_of is not None and body.best_of < body.choices:
            raise bad_parameter("best_of", f"best_of ({body.best_of}) must be at least n ({body.choices})")
        if ranked and spec.stream:
            message = "best_of cannot be larger than n with stream: true, as it ranks whole answers"
            raise bad_parameter("best_of", message)
        if spec.only_echo and not spec.echo:
            raise bad_parameter("max_tokens", "max_tokens is 0, but must be at least 1 (0 only with echo: true)")
        return spec

    async def prompts(self, body: CompletionRequest, service: Service) -> Sequence[Prompt]:
        return body.prompt

    def whole(self, reply: Reply[CompletionRequest], pieces: Sequence[Piece]) -> Completion:
        """Return the response; with best_of, it has the likeliest answers to each prompt."""
        kept, count, shown = [], reply.spec.answers, reply.body.choices
        for start in range(0, len(pieces), count):
            own = list(zip(reply.answers[start : start + count], pieces[start : start + count], strict=True))
            if count > shown:
                own.sort(key=lambda one: one[0].mean_logprob, reverse=True)
            kept += [piece for _, piece in own[:shown]]
        choices = [_choice(reply, i, piece) for i, piece in enumerate(kept)]
        head = reply.head("text_completion")
        return Completion(*head, choices, reply.usage(), reply.timings(), service_tier=reply.service_tier)

    def chunks(self, reply: Reply[CompletionRequest]) -> CompletionChunks:
        return CompletionChunks(reply, CompletionChunk, "text_completion")


class CompletionChunks(OpenAIChunks[CompletionRequest, CompletionChunk]):
    def add(self, answer: Answer, piece: Piece) -> Sequence[CompletionChunk]:
        if piece.text or piece.entries or piece.finish_reason is not None:
            return [self.chunk(_choice(self.reply, answer.index, piece))]
        return ()


def _choice(reply: Reply[CompletionRequest], index: int, piece: Piece) -> CompletionChoice:
    logprobs = completion_logprobs(piece.entries, reply.vocabulary) if reply.spec.show_logprobs else None
    origins = provenance_of(piece.entries, reply.vocabulary) if reply.spec.provenance else UNSET
    return CompletionChoice(index, piece.text, logprobs, piece.finish_reason, origins)
