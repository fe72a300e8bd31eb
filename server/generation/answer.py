"""Answer: the state of one answer. It turns the engine's deltas into pieces of text, and counts tokens, times and
drafts. The endpoint makes JSON of the pieces.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pilotfish.engine.request import Delta, Request, TokenLogprobs
from pilotfish.server.generation.provenance import origins_of
from pilotfish.server.generation.spec import GenerationSpec
from pilotfish.server.metrics import NO_DRAFTER, Metrics, Outcome
from pilotfish.text.detokenizer import AnswerText, Piece, TokenEntry
from pilotfish.text.message import MessageParser, Part

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Answer:
    """One answer to one prompt. Times are time.monotonic() seconds."""

    index: int
    """Its index among all answers of the request."""
    prompt_index: int
    spec: GenerationSpec
    request: Request
    text: AnswerText
    parser: MessageParser | None = None
    """Finds the parts of the message; None for text that is no message."""
    echo: str = ""
    """The text of the prompt, until it is put before the first piece."""
    echo_offsets: Sequence[int] = ()
    """Number of characters before each token of an echoed prompt."""

    finish_reason: str | None = None
    outcome: Outcome | None = None
    """The outcome counted in the metrics; None before the end."""
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    first_tokens: int = 0
    """Number of tokens in the first delta."""
    cached_tokens: int = 0
    drafts: Counter[str] = field(default_factory=Counter)
    """Steps that used a draft, by drafter; `drafted` and `accepted` count its tokens."""
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    logprob_sum: float = 0.0
    _starts: list[int] = field(default_factory=list, init=False)
    """Number of characters before each token, as long as reasoning may come."""

    @property
    def tokens(self) -> int:
        """Number of tokens so far, including the one that ended the answer."""
        return self.text.tokens

    @property
    def reasoning_tokens(self) -> int:
        """Number of tokens of reasoning so far, without its markers: those that begin in it."""
        thoughts = () if self.parser is None else self.parser.thoughts
        return sum(bisect_left(self._starts, end) - bisect_left(self._starts, begin) for begin, end in thoughts)

    @property
    def end(self) -> str:
        """The reason for the end: the finish_reason, or else "abort" or "error"."""
        return self.finish_reason or self.outcome or "abort"

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / self.tokens if self.tokens else 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first delta; None without any."""
        after = self.tokens - self.first_tokens
        seconds = self.last_token - (self.first_token or 0.0)
        return after / seconds if after > 0 and seconds > 0 else None

    @property
    def drafter(self) -> str:
        """The drafter that drafted the most tokens, or "none"."""
        return max(self.drafted, key=lambda name: self.drafted[name], default=NO_DRAFTER)

    def take(self, delta: Delta, metrics: Metrics) -> Piece:
        """Add a delta and return the text that it adds. The last piece has a finish_reason; a stop string can make any
        piece the last."""
        if delta.scheduled is not None:
            self.scheduled, self.cached_tokens = delta.scheduled, delta.cached_prompt_tokens
        if delta.stats is not None:
            self.preemptions = delta.stats.preemptions
        if self.spec.only_echo:
            piece = Piece("", finish_reason="length")
        else:
            text = self.text
            before = text.tokens
            piece = self._read(delta)
            if kept := text.tokens - before:
                self._account(delta, kept, metrics)
            piece.finish_reason = "stop" if text.stopped else delta.finish_reason
        self.finish_reason = piece.finish_reason
        if self.echo or delta.prompt_logprobs is not None:
            self._put_echo_before(piece, delta)
        return piece

    def _read(self, delta: Delta) -> Piece:
        """Return the text that a delta adds, and what the parser finds in it."""
        text, parser = self.text, self.parser
        logprobs: Sequence[TokenLogprobs] | None = delta.logprobs if self.spec.show_logprobs else None
        origins: Sequence[object] | None = origins_of(delta) if self.spec.provenance else None
        last, stop_token = delta.finish_reason is not None, delta.stop_token is not None
        if parser is None or not parser.thinking:
            piece = text.feed(delta.token_ids, logprobs, origins=origins, last=last, stop_token=stop_token)
            if parser is not None:
                piece.parts = parser.feed(piece.text)
                if last or text.stopped:
                    piece.parts = [*piece.parts, *parser.finish()]
            return piece
        ids, shown, entries, parts = delta.token_ids, "", list[TokenEntry](), list[Part]()
        while parser.thinking and len(ids) > 1 and not text.stopped:  # one by one, to count those of reasoning
            self._starts.append(text.start(ids[0]))
            piece = text.feed(ids[:1], _first(logprobs), origins=_first(origins))
            parts += parser.feed(piece.text)
            shown, ids, logprobs, origins = shown + piece.text, ids[1:], _rest(logprobs), _rest(origins)
            entries += piece.entries
        if not text.stopped:
            if parser.thinking and ids:  # the last one
                self._starts.append(text.start(ids[0]))
            piece = text.feed(ids, logprobs, origins=origins, last=last, stop_token=stop_token)
            parts += parser.feed(piece.text)
            shown, entries = shown + piece.text, [*entries, *piece.entries]
        if last or text.stopped:
            parts += parser.finish()
        return Piece(shown, entries, parts=parts)

    def _put_echo_before(self, piece: Piece, delta: Delta) -> None:
        piece.text, self.echo = self.echo + piece.text, ""
        if delta.prompt_logprobs is not None and self.spec.show_logprobs:
            prompt = map(TokenEntry, self.request.prompt_ids, self.echo_offsets, delta.prompt_logprobs)
            piece.entries = [*prompt, *piece.entries]

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


def _first(items: Sequence[T] | None) -> Sequence[T] | None:
    return None if items is None else items[:1]


def _rest(items: Sequence[T] | None) -> Sequence[T] | None:
    return None if items is None else items[1:]
