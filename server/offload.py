"""Work that would hold up the event loop: long texts to ids and back, and large bodies. It runs in a few threads of its
own, which nothing else waits for.

Only work that lets other threads run belongs here: tokenizers do in batches, and Python does, but not a single call
into C. A task that is cancelled while its work waits for a thread takes the work with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pilotfish.text.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

LONG_TEXT = 8192
"""Characters from which a text is tokenized in a thread: it takes about 2 ms."""
MANY_IDS = 4096
"""Ids from which they are turned into text in a thread."""
MANY_MESSAGES = 256
"""Messages from which they are translated in a thread."""
THREADS = 2
"""Each holds one text's tokens in the making, 60 bytes and more for a byte of text."""


class Offload:
    """A few threads."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="offload")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of `work`, run in a thread as soon as one is free."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Tokenizing:
    """The tokenizer for an event loop: short texts at once, long ones in a few threads that do nothing else."""

    def __init__(self, tokenizer: Tokenizer, threads: int = THREADS) -> None:
        self._tokenizer = tokenizer
        self._offload = Offload(threads)

    async def encode(self, text: str, add_special_tokens: bool, limit: int | None = None) -> Sequence[int]:
        """Return the ids of a text. Raises ParameterError("prompt") for text that is not valid Unicode, and TooLong for
        one that certainly has more than `limit` tokens, without tokenizing it."""
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens)
        return await self._offload.run(self._encode, text, add_special_tokens, limit)

    async def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        if len(ids) < MANY_IDS:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        return await self._offload.run(self._tokenizer.decode, ids, skip_special_tokens=False)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of other work that takes as long as a text."""
        return await self._offload.run(work, *args, **kwargs)

    def close(self) -> None:
        self._offload.close()

    def _encode(self, text: str, add_special_tokens: bool, limit: int | None) -> Sequence[int]:
        if limit is not None and limit < len(text):
            least = self._tokenizer.length_bound.at_least(self._tokenizer.unshield(text), limit + 1)
            if least > limit:
                raise TooLongError(least)
        return self._tokenizer.encode(text, add_special_tokens)


class TooLongError(Exception):
    """A text has at least this many tokens, which is too many."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the text has at least {least} tokens")
        self.least = least
