"""The log's line for each request: what was asked, what became of it and how fast. Nothing of a prompt's or answer's
text is in it, unless `--log-prompts` asks for the prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from starlette.types import Scope

from pilotfish.logs import fields
from pilotfish.server.auth import OPEN_PATHS
from pilotfish.server.generation import Answer, timings, usage

logger = logging.getLogger("server.requests")


def log_request(scope: Scope, status: int, seconds: float, trace_id: str | None = None) -> None:
    """Log a request that has been answered, `seconds` after it came in. Probes are for debugging alone: a 503 is what
    they are there to be told, time and again.

    Of `scope["state"]` it reads request_id, and where they are set: error (a code), answers, model, stream, prompts.
    """
    state, path = scope["state"], scope["path"]
    level = logging.DEBUG if path in OPEN_PATHS and status in (200, 503) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    client = scope.get("client")
    known = fields(
        request_id=state["request_id"],
        trace_id=trace_id,
        client=client[0] if client else None,
        method=scope["method"],
        path=path,
        status=status,
        error=state.get("error"),
        duration_ms=round(seconds * 1000, 3),
        **(account(state) if state.get("answers") else {}),
    )
    logger.log(level, "%s %s: %d", scope["method"], _printable(path), status, extra=known)


def account(state: dict[str, Any]) -> dict[str, Any]:
    """What the answers of a request came to, by names: those of `timings` where they are the same."""
    answers: Sequence[Answer] = state["answers"]
    used, timed = usage(answers), timings(answers)
    drafted = timed["drafted_tokens"]
    return {
        "id": state["id"],
        "model": state["model"],
        "stream": state["stream"],
        "answers": len(answers),
        "finish_reason": finish_reason(answers),
        "prompt_tokens": used["prompt_tokens"],
        "cached_tokens": timed["cached_tokens"],
        "tokens": used["completion_tokens"],
        "queue_ms": timed["queue_ms"],
        "ttft_ms": timed["ttft_ms"],
        "tokens_per_second": timed["tokens_per_second"],
        "drafter": timed["drafter"],
        "drafted_tokens": drafted,
        "accepted_tokens": timed["accepted_tokens"],
        "acceptance": round(timed["accepted_tokens"] / drafted, 3) if drafted else None,
        "prompts": state.get("prompts"),
    }


def finish_reason(answers: Sequence[Answer]) -> str:
    """Of all answers: "stop", "length", "abort", "error"; more than one where they differ."""
    return ",".join(sorted({answer.finish_reason or answer.outcome or "abort" for answer in answers}))


def _printable(path: str) -> str:
    """Without anything that a terminal could take for a command, and not endless."""
    return path.encode("unicode_escape").decode()[:200]
