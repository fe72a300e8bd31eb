"""Simulating requests in a closed loop, with prompts prefilled in chunks beside decoding requests, as `pilotfish bench`
measures it: from the first request's start to the last one's end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

StepTime = Callable[[int, int, int, int], float]
"""Seconds of a step by (rows, sequences, context, decoding): `context` is the sequences' mean, and `decoding` of them
decode; the others have chunks of their prompts in the step."""


@dataclass(frozen=True, slots=True)
class RequestLength:
    """The tokens of one request."""

    prompt: int
    output: int


@dataclass(slots=True)
class _Running:
    request: RequestLength
    read: int = 0
    written: float = 0.0


def play(
    requests: Sequence[RequestLength],
    concurrency: int,
    max_batch_tokens: int,
    step_time: StepTime,
    drafted: float = 0.0,
    tokens_per_step: float = 1.0,
) -> float:
    """Return the seconds until the last request has ended, with `concurrency` requests in flight.

    drafted: mean drafted tokens that a decoding sequence verifies in a step; tokens_per_step: mean tokens that it gets.
    """
    waiting, running = deque(requests), list[_Running]()
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.append(_Running(waiting.popleft()))
        decoding = [each for each in running if each.read == each.request.prompt]
        rows = len(decoding) * (1 + drafted)
        budget = max(0, max_batch_tokens - round(rows))
        for each in running:
            if each.read < each.request.prompt and budget > 0:
                chunk = min(budget, each.request.prompt - each.read)
                each.read, rows, budget = each.read + chunk, rows + chunk, budget - chunk
                if each.read == each.request.prompt:
                    each.written = 1.0  # the last chunk draws the first token
        for each in decoding:
            each.written += tokens_per_step
        context = sum(each.read + each.written for each in running) / len(running)
        seconds += step_time(max(1, round(rows)), len(running), round(context), len(decoding))
        running = [each for each in running if each.written < each.request.output]
    return seconds
