"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.engine.request import EngineInfo
from pilotfish.errors import shown
from pilotfish.server.bodies import BodyRoute
from pilotfish.server.chat.conversation import declared, goes_on, turns_of
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import bad_parameter
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.offload import MANY_IDS, MANY_MESSAGES
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.protocol.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from pilotfish.server.protocol.unknown import unknown_fields
from pilotfish.server.service import Service, ServiceDependency

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize", **returns(Tokenized))
async def tokenize(body: TokenizeRequest, request: Request, service: ServiceDependency) -> Response:
    """Return the token ids of a prompt, or of a conversation as /v1/chat/completions would send it to the model."""
    info = service.ready()
    facts_of(request.scope).ignored = unknown_fields(body, service.config.strict_requests)
    service.check_model(body.model)
    if body.messages is not None:
        if body.prompt is not None:
            raise bad_parameter("prompt", "prompt and messages are two ways to say the same: give only one of them")
        continues = goes_on(body.messages, body.continue_final_message, body.add_generation_prompt)
        conversation = Conversation(
            turns=turns_of(body.messages)
            if len(body.messages) < MANY_MESSAGES
            else await service.offload.run(turns_of, body.messages),
            tools=declared([tool.function for tool in body.tools or ()], "tools"),
            template_variables=body.chat_template_kwargs or {},
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
        )
        rendered = await service.render(conversation, service.format)
        ids = await service.encode(rendered.text, "messages", bool(body.add_special_tokens))
    elif body.prompt is None:
        raise bad_parameter(
            "prompt", "Missing required parameter: 'prompt' or 'messages'.", "missing_required_parameter"
        )
    else:
        ids = await service.encode(body.prompt, "prompt", body.add_special_tokens is not False)
    if len(ids) < MANY_IDS:
        return _tokenized(service, info, ids, bool(body.return_token_strs))
    return await service.offload.run(_tokenized, service, info, ids, bool(body.return_token_strs))


def _tokenized(service: Service, info: EngineInfo, ids: Sequence[int], spelled: bool) -> Response:
    strings = [service.tokenizer.token(id_) for id_ in ids] if spelled else None
    return json_response(Tokenized(len(ids), info.max_model_len, ids, strings))


@router.get("/tokenizer_info", **returns(TokenizerInfo))
async def tokenizer_info(service: ServiceDependency) -> Response:
    """Return the special tokens and the chat template of the model's tokenizer."""
    info, tokenizer = service.ready(), service.tokenizer
    named = tokenizer.named_tokens
    return json_response(
        TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            chat_template=tokenizer.chat_template,
            model_max_length=info.max_model_len,
            vocab_size=tokenizer.vocab_size,
        )
    )


@router.post("/detokenize", **returns(Detokenized))
async def detokenize(body: DetokenizeRequest, request: Request, service: ServiceDependency) -> Response:
    """Return the text of token ids, including special tokens."""
    info = service.ready()
    facts_of(request.scope).ignored = unknown_fields(body, service.config.strict_requests)
    service.check_model(body.model)
    if len(body.tokens) < MANY_IDS:
        _check_ids(body.tokens, info)
    else:
        await service.offload.run(_check_ids, body.tokens, info)
    return json_response(Detokenized(await service.tokenizing.decode(body.tokens)))


def _check_ids(ids: Sequence[int], info: EngineInfo) -> None:
    """Raise ApiError 400 for an id that the model has not."""
    for id_ in ids:
        if not 0 <= id_ < info.vocab_size:
            raise bad_parameter(
                "tokens", f"tokens has {shown(id_)}, but token ids must be between 0 and {info.vocab_size - 1}"
            )
