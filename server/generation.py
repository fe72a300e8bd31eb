"""Answers on their way from the engine to a client: deltas in, pieces of text out, and the accounts of it (usage,
timings, metrics). Which JSON they become is for the routes to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pilotfish.engine.process.client import AsyncEngine
from pilotfish.engine.request import Delta, Request
from pilotfish.errors import EngineDeadError
from pilotfish.server.errors import SERVER_ERROR, ApiError, cut_short
from pilotfish.server.metrics import NO_DRAFTER, Metrics, Outcome
from pilotfish.server.protocol.responses import Timings, Usage
from pilotfish.text.detokenizer import AnswerText, Piece, TokenEntry

logger = logging.getLogger(__name__)

PREDICTION = "prediction"
"""The drafter whose tokens OpenAI's usage counts."""


class Answer:
    """One answer to one prompt, while it comes in. Times are time.monotonic() seconds.

    `echo` is text that goes before it, with `echo_offsets`: for each prompt token, the characters before it. An answer
    that is `only_echo` ends before its first token. `show_logprobs` False: they were asked of the engine for ranking
    alone.
    """

    def __init__(
        self,
        index: int,
        prompt_index: int,
        request: Request,
        text: AnswerText,
        *,
        echo: str = "",
        echo_offsets: Sequence[int] = (),
        only_echo: bool = False,
        show_logprobs: bool = True,
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.finish_reason: str | None = None
        self.outcome: Outcome | None = None
        """How it ended; None before that."""
        self.cached_tokens = 0
        self.drafted: Counter[str] = Counter()
        """Drafted tokens by drafter, and which of them are in the answer."""
        self.accepted: Counter[str] = Counter()
        self.drafts: Counter[str] = Counter()
        """Steps in which a draft of a drafter was chosen."""
        self.logprob_sum = 0.0
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.first_tokens = 0
        """Tokens that the first delta brought."""
        self.last_token = 0.0
        self._text = text
        self._echo = echo
        self._echo_offsets = echo_offsets
        self._only_echo = only_echo
        self._show_logprobs = show_logprobs

    @property
    def tokens(self) -> int:
        return self._text.tokens

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / self.tokens if self.tokens else 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first delta, or None if there were none."""
        after = self.tokens - self.first_tokens
        seconds = self.last_token - (self.first_token or 0.0)
        return after / seconds if after > 0 and seconds > 0 else None

    @property
    def drafter(self) -> str:
        """Who drafted most of what was drafted for it, or "none"."""
        return max(self.drafted, key=lambda name: self.drafted[name], default=NO_DRAFTER)

    def take(self, delta: Delta, metrics: Metrics) -> Piece:
        """What a delta adds to the text. The last piece, which a stop string can make this, has a finish_reason."""
        entries: list[TokenEntry] = []
        echo, self._echo = self._echo, ""
        if delta.prompt_logprobs is not None and self._show_logprobs:
            ids = self.request.prompt_ids
            entries = list(map(TokenEntry, ids, self._echo_offsets, delta.prompt_logprobs))
        if delta.scheduled is not None:
            self.scheduled, self.cached_tokens = delta.scheduled, delta.cached_prompt_tokens
        if self._only_echo:
            self.finish_reason = "length"
            return Piece(echo, entries, "length")
        before = self.tokens
        piece = self._text.feed(
            delta.token_ids,
            delta.logprobs if self._show_logprobs else None,
            last=delta.finish_reason is not None,
            stop_token=delta.stop_token is not None,
        )
        kept = self.tokens - before
        if kept:
            self._account(delta, kept, metrics)
        if echo or entries:
            piece.text, piece.entries = echo + piece.text, entries + piece.entries
        piece.finish_reason = self.finish_reason = "stop" if self._text.stopped else delta.finish_reason
        return piece

    def _account(self, delta: Delta, kept: int, metrics: Metrics) -> None:
        if delta.drafted:
            self.drafts[delta.drafter] += 1
            self.drafted[delta.drafter] += delta.drafted
            self.accepted[delta.drafter] += min(delta.accepted, kept)
        if delta.logprobs is not None:
            self.logprob_sum += sum(token.logprob for token in delta.logprobs[:kept])
        now = time.monotonic()
        if self.first_token is None:
            self.first_token, self.first_tokens = now, kept
            arrival = self.request.arrival
            metrics.first_token(now - arrival, (self.scheduled or now) - arrival)
        else:
            metrics.inter_token(now - self.last_token, kept)
        self.last_token = now


async def follow(engine: AsyncEngine, answer: Answer, metrics: Metrics) -> AsyncGenerator[Piece, None]:
    """The pieces of one answer; the last has a finish_reason. The request has left the engine by then,
    and so it has if this is closed or cancelled. Raises what `AsyncEngine.generate` does, and ApiError for a request
    that the engine itself has given up.
    """
    outcome: Outcome = "error"
    last = None
    try:
        async with aclosing(engine.generate(answer.request)) as deltas:
            async for delta in deltas:
                if delta.finish_reason == "abort":
                    outcome = "abort"
                    raise cut_short()
                if delta.finish_reason == "error":
                    message = delta.error or "The engine could not finish this request."
                    raise ApiError(500, message, type=SERVER_ERROR, code="engine_error")
                piece = answer.take(delta, metrics)
                if answer.finish_reason is not None:
                    last = piece
                    break
                yield piece
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
    yield last


async def follow_all(
    engine: AsyncEngine, answers: Sequence[Answer], metrics: Metrics
) -> AsyncGenerator[tuple[Answer, Piece], None]:
    """The pieces of several answers, as they come. If one fails, or this is closed, all of them end."""
    if len(answers) == 1:
        async with aclosing(follow(engine, answers[0], metrics)) as pieces:
            async for piece in pieces:
                yield answers[0], piece
        return
    queue: asyncio.Queue[tuple[Answer, Piece] | Exception] = asyncio.Queue()

    async def put_all(answer: Answer) -> None:
        try:
            async with aclosing(follow(engine, answer, metrics)) as pieces:
                async for piece in pieces:
                    queue.put_nowait((answer, piece))
        except Exception as error:  # raised where it can be caught, below
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


def usage(answers: Sequence[Answer]) -> Usage:
    """Tokens of all answers; a prompt counts once, however many answers it has."""
    prompts = {answer.prompt_index: answer for answer in reversed(answers)}.values()  # the first answer to each
    prompt_tokens = sum(len(answer.request.prompt_ids) for answer in prompts)
    completion_tokens = sum(answer.tokens for answer in answers)
    accepted = sum(answer.accepted[PREDICTION] for answer in answers)
    predicted = sum(answer.drafted[PREDICTION] for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": predicted - accepted,
        },
    }


def timings(answers: Sequence[Answer]) -> Timings:
    """How the answers came about, from the first of them to the last."""
    arrival = answers[0].request.arrival
    scheduled = min((answer.scheduled for answer in answers if answer.scheduled is not None), default=None)
    first = min((answer.first_token for answer in answers if answer.first_token is not None), default=None)
    decode = None if first is None else max(answer.last_token for answer in answers) - first
    after = sum(answer.tokens - answer.first_tokens for answer in answers)
    drafts = sum((answer.drafts for answer in answers), Counter[str]())
    drafted = sum((answer.drafted for answer in answers), Counter[str]())
    accepted = sum((answer.accepted for answer in answers), Counter[str]())
    return {
        "queue_ms": None if scheduled is None else _ms(scheduled - arrival),
        "ttft_ms": None if first is None else _ms(first - arrival),
        "decode_ms": None if decode is None else _ms(decode),
        "tokens_per_second": round(after / decode, 3) if decode and after else None,
        "drafter": max(drafted, key=lambda name: drafted[name], default=NO_DRAFTER),
        "drafted_tokens": drafted.total(),
        "accepted_tokens": accepted.total(),
        "drafters": {
            name: {
                "steps": steps,
                "drafted_tokens": drafted[name],
                "accepted_tokens": accepted[name],
                "mean_length": round(drafted[name] / steps, 3),
            }
            for name, steps in drafts.most_common()
        },
        "cached_tokens": usage(answers)["prompt_tokens_details"]["cached_tokens"],
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
