"""Receives answers from the engine: pieces of text as they arrive, of one answer or of several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pilotfish.engine.process.supervisor import SupervisedEngine
from pilotfish.engine.request import GRAMMAR_LIMIT
from pilotfish.errors import EngineDeadError
from pilotfish.server.errors import SERVER_ERROR, ApiError, cut_short, timed_out
from pilotfish.server.generation.answer import Answer
from pilotfish.server.metrics import Metrics, Outcome
from pilotfish.text.detokenizer import Piece

Pieces = AsyncGenerator[tuple[Answer, Piece], None]
"""Pieces, each with its answer."""


def follow_all(engine: SupervisedEngine, answers: Sequence[Answer], metrics: Metrics, at_once: int) -> Pieces:
    """Yield the pieces of several answers as they arrive; `at_once` of them are generated at a time. If one fails, or
    the generator is closed, all of them end."""
    if len(answers) == 1:  # the common case needs no task and no queue for each chunk
        return follow(engine, answers[0], metrics)
    return _merge(engine, answers, metrics, at_once)


async def follow(engine: SupervisedEngine, answer: Answer, metrics: Metrics) -> Pieces:
    """Yield the pieces of one answer; the last has a finish_reason. The request has left the engine by then, and also
    if the generator is closed or cancelled. Raises the errors of `SupervisedEngine.generate`, and ApiError for a
    request that the engine gave up.
    """
    outcome: Outcome = "error"
    last = None
    try:
        async with aclosing(engine.generate(answer.request)) as deltas:
            async for delta in deltas:
                match delta.finish_reason:
                    case "abort":
                        outcome = "abort"
                        raise cut_short()
                    case "timeout":
                        raise timed_out()
                    case "error":
                        message = delta.error or "The engine could not finish this request."
                        if message.startswith(GRAMMAR_LIMIT):  # what the client has sent is too large
                            raise ApiError(400, message, code="grammar_too_large")
                        raise ApiError(500, message, type=SERVER_ERROR, code="engine_error")
                piece = answer.take(delta, metrics)
                if piece.finish_reason is not None:
                    last = piece
                    break
                yield answer, piece
        if last is None:
            raise EngineDeadError("the engine ended a request without saying why")
        outcome = "length" if answer.finish_reason == "length" else "stop"
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "abort"
        raise
    finally:
        answer.outcome = outcome
        metrics.ended(
            outcome,
            time.monotonic() - answer.request.arrival,
            answer.decode_rate,
            drafter=answer.drafter,
            prompt_tokens=len(answer.request.prompt_ids),
            tokens=answer.tokens,
        )
    yield answer, last


async def _merge(engine: SupervisedEngine, answers: Sequence[Answer], metrics: Metrics, at_once: int) -> Pieces:
    queue: asyncio.Queue[tuple[Answer, Piece] | Exception] = asyncio.Queue()

    turns = asyncio.Semaphore(at_once)

    async def put_all(answer: Answer) -> None:
        try:
            async with turns, aclosing(follow(engine, answer, metrics)) as pieces:
                async for item in pieces:
                    queue.put_nowait(item)
        except Exception as error:  # raised again below
            queue.put_nowait(error)

    tasks = [asyncio.create_task(put_all(answer)) for answer in answers]
    try:
        unfinished = len(answers)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= item[1].finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
