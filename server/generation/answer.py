"""Answer: one answer while it comes in. Deltas of the engine go in, pieces of text come out, and what happened on the
way is counted. Which JSON the pieces become is the endpoint's business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pilotfish.engine.request import Delta, Request
from pilotfish.server.generation.spec import GenerationSpec
from pilotfish.server.metrics import NO_DRAFTER, Metrics, Outcome
from pilotfish.text.detokenizer import AnswerText, Piece, TokenEntry


@dataclass(slots=True, eq=False)
class Answer:
    """One answer to one prompt. Times are time.monotonic() seconds."""

    index: int
    """Its position among all answers of the request."""
    prompt_index: int
    spec: GenerationSpec
    request: Request
    text: AnswerText
    echo: str = ""
    """The prompt's text, until the first piece has it."""
    echo_offsets: Sequence[int] = ()
    """Characters before each token of an echoed prompt."""

    finish_reason: str | None = None
    outcome: Outcome | None = None
    """The outcome that is counted for it; None before its end."""
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    first_tokens: int = 0
    """Tokens that the first delta brought."""
    cached_tokens: int = 0
    drafts: Counter[str] = field(default_factory=Counter)
    """Steps in which a drafter's draft was chosen; below, the drafted tokens, and those that were accepted."""
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    logprob_sum: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens so far, the one that ended it included."""
        return self.text.tokens

    @property
    def end(self) -> str:
        """The reason for its end: its finish_reason, or else "abort" or "error"."""
        return self.finish_reason or self.outcome or "abort"

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / self.tokens if self.tokens else 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first delta; None if there were none."""
        after = self.tokens - self.first_tokens
        seconds = self.last_token - (self.first_token or 0.0)
        return after / seconds if after > 0 and seconds > 0 else None

    @property
    def drafter(self) -> str:
        """The drafter that drafted most tokens for it, or "none"."""
        return max(self.drafted, key=lambda name: self.drafted[name], default=NO_DRAFTER)

    def take(self, delta: Delta, metrics: Metrics) -> Piece:
        """Add a delta and return what it adds to the text. The last piece has a finish_reason; a stop string can make
        any piece the last."""
        if delta.scheduled is not None:
            self.scheduled, self.cached_tokens = delta.scheduled, delta.cached_prompt_tokens
        if self.spec.only_echo:
            piece = Piece("", finish_reason="length")
        else:
            text = self.text
            before = text.tokens
            piece = text.feed(
                delta.token_ids,
                delta.logprobs if self.spec.show_logprobs else None,
                last=delta.finish_reason is not None,
                stop_token=delta.stop_token is not None,
            )
            if kept := text.tokens - before:
                self._account(delta, kept, metrics)
            piece.finish_reason = "stop" if text.stopped else delta.finish_reason
        self.finish_reason = piece.finish_reason
        if self.echo or delta.prompt_logprobs is not None:
            self._put_echo_before(piece, delta)
        return piece

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
