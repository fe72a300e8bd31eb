"""A load played through: requests in a closed loop, their prompts read in chunks beside those that decode. The time is
what `pilotfish bench` measures: from the first request's start to the last one's end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

StepTime = Callable[[int, int, int, int], float]
"""Seconds of a step by (rows, sequences, context, decoding): `context` is the mean of the sequences', `decoding` how
many of them decode; the other sequences have chunks of their prompts in the step."""


@dataclass(frozen=True, slots=True)
class Job:
    prompt: int
    output: int


@dataclass(slots=True)
class _Running:
    job: Job
    read: int = 0
    written: float = 0.0


def play(
    jobs: Sequence[Job],
    concurrency: int,
    max_batch_tokens: int,
    step_time: StepTime,
    drafted: float = 0.0,
    tokens_per_step: float = 1.0,
) -> float:
    """Seconds until the last job has ended, with `concurrency` in flight while there are so many.

    `drafted`: tokens that a decoding sequence verifies in a step on average, `tokens_per_step`: that it gets of it.
    """
    waiting, running = deque(jobs), list[_Running]()
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.append(_Running(waiting.popleft()))
        decoding = [each for each in running if each.read == each.job.prompt]
        rows = len(decoding) * (1 + drafted)
        budget = max(0, max_batch_tokens - round(rows))
        for each in running:
            if each.read < each.job.prompt and budget > 0:
                chunk = min(budget, each.job.prompt - each.read)
                each.read, rows, budget = each.read + chunk, rows + chunk, budget - chunk
                if each.read == each.job.prompt:
                    each.written = 1.0  # the last chunk draws the first token
        for each in decoding:
            each.written += tokens_per_step
        context = sum(each.read + each.written for each in running) / len(running)
        seconds += step_time(max(1, round(rows)), len(running), round(context), len(decoding))
        running = [each for each in running if each.written < each.job.output]
    return seconds
