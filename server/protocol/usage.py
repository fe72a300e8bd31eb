"""The parts that all responses with generated text share: common fields, usage and timings."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens of all choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TokenOrigin(msgspec.Struct):
    """Where a token of an answer came from."""

    token: str
    drafter: str | None
    """The drafter that proposed it; null for a token that the target drew without or after a draft."""
    position: int | None
    """Its position in the draft, from 1; null with `drafter`."""
    rejected: int | UnsetType = UNSET
    """Number of drafted tokens that were rejected where the target drew this one; only if there were any."""
    rejected_tokens: list[str] | UnsetType = UNSET
    """Their texts."""
    rejected_drafter: str | UnsetType | None = UNSET


class DrafterTimings(msgspec.Struct):
    """One drafter's share of an answer."""

    steps: int
    """Number of steps that used one of its drafts."""
    drafted_tokens: int
    """Number of drafted tokens that were verified."""
    accepted_tokens: int
    mean_length: float
    """Mean number of verified tokens in its drafts."""


class Timings(msgspec.Struct):
    """Times and drafts of an answer. Several choices count together, from the first to the last."""

    queue_ms: float | None
    """Time from the request's arrival to its first step."""
    ttft_ms: float | None
    """Time from the request's arrival to the first token."""
    decode_ms: float | None
    """Time from the first token to the last."""
    tokens_per_second: float | None
    """Tokens after the first step, per second of decode_ms; null without any."""
    drafter: str
    """The drafter that drafted the most tokens, or "none"."""
    drafted_tokens: int
    accepted_tokens: int
    drafters: dict[str, DrafterTimings]
    """The share of each drafter, most steps first."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Tiered(msgspec.Struct, kw_only=True):
    service_tier: str | UnsetType = UNSET
    """Only if the request has one."""


class Response(Tiered):
    """The fields that OpenAI's whole responses and their chunks begin with."""

    id: str
    object: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
