"""The chunks of OpenAI's streams, shared by completions and chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from msgspec import UNSET

from pilotfish.server.generation.flow import Reply
from pilotfish.server.protocol.chat import ChatChunk
from pilotfish.server.protocol.common import GenerationRequest
from pilotfish.server.protocol.completions import CompletionChunk

Body = TypeVar("Body", bound=GenerationRequest)
Chunk = TypeVar("Chunk", ChatChunk, CompletionChunk)


class OpenAIChunks(Generic[Body, Chunk]):
    """Makes chunks with one choice each. Timings are in the last chunk; with include_usage, usage and timings are in an
    additional one. With continuous_usage_stats, every chunk has the usage so far."""

    def __init__(self, reply: Reply[Body], chunk_type: type[Chunk], object_: str) -> None:
        self.reply = reply
        self._make: Callable[..., Chunk] = chunk_type
        self._head = reply.head(object_)
        self._tier = reply.service_tier
        self._final_usage = reply.body.include_usage
        self._continuous = reply.body.continuous_usage
        self._usage = None if self._final_usage else UNSET
        self._unfinished = len(reply.answers)

    def begin(self) -> Sequence[Chunk]:
        return ()

    def chunk(self, choice: Any) -> Chunk:
        """Return the chunk of a choice; the last one if `choice` has a finish_reason and no other is unfinished."""
        usage = self.reply.usage() if self._continuous else self._usage
        if choice.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished and not self._final_usage:
                return self._make(*self._head, (choice,), usage, self.reply.timings(), service_tier=self._tier)
        return self._make(*self._head, (choice,), usage, service_tier=self._tier)

    def end(self) -> Sequence[Chunk]:
        if self._final_usage:
            return [self._make(*self._head, (), self.reply.usage(), self.reply.timings(), service_tier=self._tier)]
        return ()
