"""Request and response of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, PlainValidator

from pilotfish.server.protocol.common import GenerationRequest, Prompt, Unsupported, wrong
from pilotfish.server.protocol.usage import Response, Timings, TokenOrigin, Usage

MAX_LOGPROBS = 5
"""OpenAI's limit for completions; chat's is 20."""
MAX_BEST_OF = 128


def _prompts(value: Any) -> list[Prompt]:
    """Return a list of prompts for any of the four forms; null is the beginning of a document, as ""."""
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and all(type(id_) is int for id_ in item) for item in value):
            return value
    raise wrong("must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty")


Prompts = Annotated[
    list[Prompt], PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None)
]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    best_of: Annotated[int | None, Field(ge=1, le=MAX_BEST_OF)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    suffix: Unsupported = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's begin-of-text token before a prompt that is text; the default."""


class CompletionLogprobs(msgspec.Struct):
    """An item for each token. A token that is part of a character is spelled "bytes:\\xe2\\x82"."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """A choice of a whole response, or a chunk's addition to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    provenance: list[TokenOrigin] | UnsetType = UNSET
    """Only with include_provenance."""


class Completion(Response):
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings


class CompletionChunk(Response):
    choices: tuple[CompletionChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    """Only in streams with include_usage: null before the last chunk, or the usage so far."""
    timings: Timings | UnsetType = UNSET
    """Only in the last chunk."""
