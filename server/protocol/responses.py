"""What the API answers. Typed dictionaries: they document, and cost nothing where a chunk is written per step."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class DrafterTimings(TypedDict):
    """What one drafter did for an answer."""

    steps: int
    """In which a draft of its was chosen."""
    drafted_tokens: int
    """That were verified."""
    accepted_tokens: int
    mean_length: float
    """Of the drafts, as far as they were verified."""


class Timings(TypedDict):
    """How an answer came about. Several choices count together: from the first of them to the last."""

    queue_ms: float | None
    """From the request's arrival to its first step."""
    ttft_ms: float | None
    """From the request's arrival to the first token."""
    decode_ms: float | None
    """From the first token to the last."""
    tokens_per_second: float | None
    """Tokens that came after the first step that brought any, per second of decode_ms; null if there were none."""
    drafter: str
    drafted_tokens: int
    accepted_tokens: int
    drafters: dict[str, DrafterTimings]
    """By drafter, those of most steps first."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    role: str
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int | None
    """null until the model is loaded."""


class ModelList(TypedDict):
    object: str
    data: list[Model]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str] | None]


class Detokenized(TypedDict):
    prompt: str


class ErrorBody(TypedDict):
    error: dict[str, Any]
