"""The recent requests and where their time went, for the page. No text, but that of prompts with `--log-prompts`."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from pilotfish.server.generation.facts import RequestFacts
from pilotfish.server.generation.usage import timings_of, usage_of
from pilotfish.server.protocol.usage import DrafterTimings

KEPT = 100
LONGEST_PROMPT = 2000
"""Characters of a prompt that are kept."""


class RecentRequest(msgspec.Struct, kw_only=True):
    """A request that was given to the engine. Fields are named as in `Timings` where it has them."""

    request_id: str
    time: float
    """Seconds since 1970, of its end."""
    path: str
    status: int
    error: str | None
    model: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    queue_ms: float | None
    ttft_ms: float | None
    decode_ms: float | None
    duration_ms: float
    tokens_per_second: float | None
    preemptions: int
    drafters: dict[str, DrafterTimings]
    prompts: list[str] | None


class RecentRequests:
    """The last KEPT requests, the newest first, each with its tenant."""

    def __init__(self) -> None:
        self._kept: deque[tuple[str, RecentRequest]] = deque(maxlen=KEPT)

    def add(self, path: str, facts: RequestFacts, status: int, seconds: float) -> None:
        """Keep a request that took `seconds`, if it was given to the engine."""
        generation = facts.generation
        if generation is None:
            return
        answers = generation.answers
        usage, timings = usage_of(answers), timings_of(answers)
        prompts = None if generation.prompts is None else [prompt[:LONGEST_PROMPT] for prompt in generation.prompts]
        kept = RecentRequest(
            request_id=facts.request_id,
            time=time.time(),
            path=path,
            status=status,
            error=facts.error,
            model=generation.spec.model,
            finish_reason=",".join(sorted({answer.end for answer in answers})),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=timings.cached_tokens,
            tokens=usage.completion_tokens,
            queue_ms=timings.queue_ms,
            ttft_ms=timings.ttft_ms,
            decode_ms=timings.decode_ms,
            duration_ms=round(seconds * 1000, 3),
            tokens_per_second=timings.tokens_per_second,
            preemptions=sum(answer.preemptions for answer in answers),
            drafters=timings.drafters,
            prompts=prompts,
        )
        self._kept.appendleft((facts.tenant, kept))

    def of_tenant(self, tenant: str) -> list[RecentRequest]:
        """Return the requests of a tenant, the newest first."""
        return [kept for own, kept in self._kept if own == tenant]
