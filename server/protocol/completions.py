"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from pilotfish.server.protocol.common import GenerationRequest, Prompt, Unsupported, wrong

MAX_LOGPROBS = 5
"""OpenAI's limit for completions; chat's is 20."""
MAX_BEST_OF = 128


def _prompts(value: Any) -> list[Prompt]:
    """A string, strings, ids or lists of ids: always a list of prompts."""
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
    list[Prompt], PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    best_of: Annotated[int | None, Field(ge=1, le=MAX_BEST_OF)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    suffix: Unsupported = None
    add_special_tokens: bool = True
    """Whether the tokenizer puts its begin-of-text token before a prompt that is text."""
