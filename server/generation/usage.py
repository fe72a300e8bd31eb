"""Reports on the answers of a request: OpenAI's usage and Pilotfish's timings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pilotfish.server.generation.answer import Answer
from pilotfish.server.metrics import NO_DRAFTER
from pilotfish.server.protocol.usage import (
    CompletionTokensDetails,
    DrafterTimings,
    PromptTokensDetails,
    Timings,
    Usage,
)

PREDICTION = "prediction"
"""The drafter whose tokens OpenAI's usage reports."""


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Count the tokens of all answers; a prompt counts once, however many answers it has."""
    prompts = {answer.prompt_index: answer for answer in reversed(answers)}.values()  # the first answer to each
    prompt_tokens = sum(len(answer.request.prompt_ids) for answer in prompts)
    completion_tokens = sum(answer.tokens for answer in answers)
    accepted = sum(answer.accepted[PREDICTION] for answer in answers)
    predicted = sum(answer.drafted[PREDICTION] for answer in answers)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(sum(answer.cached_tokens for answer in prompts)),
        completion_tokens_details=CompletionTokensDetails(
            accepted, predicted - accepted, sum(answer.reasoning_tokens for answer in answers)
        ),
    )


def timings_of(answers: Sequence[Answer]) -> Timings:
    """Return the timings of all answers together, from the first to the last."""
    arrival = answers[0].request.arrival
    scheduled = min((answer.scheduled for answer in answers if answer.scheduled is not None), default=None)
    first = min((answer.first_token for answer in answers if answer.first_token is not None), default=None)
    decode = None if first is None else max(answer.last_token for answer in answers) - first
    after = sum(answer.tokens - answer.first_tokens for answer in answers)
    drafts, drafted, accepted = (
        sum((getattr(answer, name) for answer in answers), Counter[str]()) for name in ("drafts", "drafted", "accepted")
    )
    return Timings(
        queue_ms=None if scheduled is None else _ms(scheduled - arrival),
        ttft_ms=None if first is None else _ms(first - arrival),
        decode_ms=None if decode is None else _ms(decode),
        tokens_per_second=round(after / decode, 3) if decode and after else None,
        drafter=max(drafted, key=lambda name: drafted[name], default=NO_DRAFTER),
        drafted_tokens=drafted.total(),
        accepted_tokens=accepted.total(),
        drafters={
            name: DrafterTimings(steps, drafted[name], accepted[name], round(drafted[name] / steps, 3))
            for name, steps in drafts.most_common()
        },
        cached_tokens=usage_of(answers).prompt_tokens_details.cached_tokens,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
