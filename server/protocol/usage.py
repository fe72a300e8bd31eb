"""The parts that all responses with generated text share: head, usage and timings."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct):
    """Tokens of all choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class DrafterTimings(msgspec.Struct):
    """One drafter's share in an answer."""

    steps: int
    """Steps in which one of its drafts was chosen."""
    drafted_tokens: int
    """Drafted tokens that were verified."""
    accepted_tokens: int
    mean_length: float
    """Mean length of its drafts, as far as they were verified."""


class Timings(msgspec.Struct):
    """Times and drafts of an answer. Several choices count together, from the first of them to the last."""

    queue_ms: float | None
    """Time from the request's arrival to its first step."""
    ttft_ms: float | None
    """Time from the request's arrival to the first token."""
    decode_ms: float | None
    """Time from the first token to the last."""
    tokens_per_second: float | None
    """Tokens after the first step that brought any, per second of decode_ms; null if there were none."""
    drafter: str
    """The drafter that drafted most tokens, or "none"."""
    drafted_tokens: int
    accepted_tokens: int
    drafters: dict[str, DrafterTimings]
    """Each drafter's share, the one with the most steps first."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Response(msgspec.Struct):
    """The fields that OpenAI's whole responses and their chunks begin with."""

    id: str
    object: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
