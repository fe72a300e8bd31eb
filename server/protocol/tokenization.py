"""Requests and responses of POST /tokenize and /detokenize, compatible with vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from pydantic import FailFast, Field

from pilotfish.server.protocol.chat import Message
from pilotfish.server.protocol.common import ApiModel
from pilotfish.server.protocol.tools import Tools


class TokenizeRequest(ApiModel):
    """A prompt, or the messages of a chat: one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1), FailFast()] = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose chat template adds them."""
    tools: Tools = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: list[str] | None = None
    """The tokens as text, with return_token_strs."""


class TokenizerInfo(msgspec.Struct):
    """The parts of tokenizer_config.json that evaluation tools ask for, as vLLM has them."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int
    vocab_size: int
    """One more than the highest token id."""


class Detokenized(msgspec.Struct):
    prompt: str
