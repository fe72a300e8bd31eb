"""The log line of each request: what was requested, how it ended and how fast. It never has the text of answers, and
that of prompts only with `--log-prompts`."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Scope

from pilotfish.logs import fields
from pilotfish.server.auth import OPEN_PATHS, PAGE_PREFIX
from pilotfish.server.generation.facts import GenerationFacts, facts_of
from pilotfish.server.generation.usage import timings_of, usage_of

logger = logging.getLogger("server.requests")


def log_request(scope: Scope, status: int, seconds: float, trace_id: str | None = None) -> None:
    """Log a request that was answered `seconds` after its arrival. Probes are frequent, so they are logged at level
    debug, including their 503s, and requests with fields that were ignored at level warning."""
    facts, path = facts_of(scope), scope["path"]
    probes = path in OPEN_PATHS or path.startswith(PAGE_PREFIX)
    level = logging.DEBUG if probes and status in (200, 304, 503) else logging.INFO
    if facts.ignored:
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    client = scope.get("client")
    known = fields(
        request_id=facts.request_id,
        trace_id=trace_id,
        client=client[0] if client else None,
        tenant=facts.tenant or None,
        session=facts.session,
        method=scope["method"],
        path=path,
        status=status,
        error=facts.error,
        ignored=", ".join(facts.ignored).encode("unicode_escape").decode()[:200] or None,
        duration_ms=round(seconds * 1000, 3),
        **(summary_of(facts.generation) if facts.generation is not None else {}),
    )
    logger.log(level, "%s %s: %d", scope["method"], _printable(path), status, extra=known)


def summary_of(generation: GenerationFacts) -> dict[str, Any]:
    """Return fields that sum up the answers of a request, named as in `Timings` where it has them."""
    answers, spec = generation.answers, generation.spec
    usage, timings = usage_of(answers), timings_of(answers)
    return {
        "id": generation.id,
        "model": spec.model,
        "stream": spec.stream,
        "answers": len(answers),
        "finish_reason": ",".join(sorted({answer.end for answer in answers})),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "tokens": usage.completion_tokens,
        "queue_ms": timings.queue_ms,
        "ttft_ms": timings.ttft_ms,
        "tokens_per_second": timings.tokens_per_second,
        "drafter": timings.drafter,
        "drafted_tokens": timings.drafted_tokens,
        "accepted_tokens": timings.accepted_tokens,
        "acceptance": round(timings.accepted_tokens / timings.drafted_tokens, 3) if timings.drafted_tokens else None,
        "prompts": generation.prompts,
    }


def _printable(path: str) -> str:
    """Return up to 200 characters of the path, control characters escaped, since a terminal could execute them."""
    return path.encode("unicode_escape").decode()[:200]
