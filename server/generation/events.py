"""Server-sent events, and work that is cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing, suppress
from functools import cache
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.facts import RequestFacts, facts_of
from pilotfish.server.generation.follow import Pieces
from pilotfish.text.detokenizer import Piece

T = TypeVar("T")

PING_SECONDS = 15.0
"""Proxies and clients often close a connection on which nothing comes for a minute, as a long prompt may take."""
DONE = b"data: [DONE]\n\n"
"""The end of OpenAI's streams."""

_encode = msgspec.json.Encoder().encode


class ClientGoneError(Exception):
    """The client closed the connection before the response was complete."""


def event(data: msgspec.Struct) -> bytes:
    """Encode one event. A struct with a tag becomes an event of that name: `class Created(Struct, tag_field="type",
    tag="response.created")` is sent as "event: response.created"."""
    return b"%b%b\n\n" % (_prefix(type(data)), _encode(data))


@cache
def _prefix(kind: type[msgspec.Struct]) -> bytes:
    name = kind.__struct_config__.tag
    return b"data: " if name is None else f"event: {name}\ndata: ".encode()


class Chunks(Protocol):
    """Makes the events of one streamed response from the pieces of its answers."""

    def begin(self) -> Sequence[msgspec.Struct]:
        """Return the events before the first piece."""
        ...

    def add(self, answer: Answer, piece: Piece) -> Sequence[msgspec.Struct]:
        """Return the events of a piece; the last piece of an answer has a finish_reason."""
        ...

    def end(self) -> Sequence[msgspec.Struct]:
        """Return the events after the last piece of all answers."""
        ...


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Raises ClientGoneError, with `work` cancelled, if the client disconnects first.

    The request's body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events: those that `chunks` makes of `pieces`, then `end`.

    An exception from `pieces` becomes an event in the endpoint's form of errors, as the status has been sent by then.
    `admission` is released when the stream ends, however it does. `ping` is sent in between, every PING_SECONDS.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: Chunks,
        pieces: Pieces,
        admission: AbstractContextManager[object],
        end: bytes = DONE,
        ping: bytes = b"",
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._pieces = pieces
        self._admission = admission
        self._end = end
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission, suppress(ClientGoneError):
            await until_disconnect(receive, self._write(send, facts_of(scope)))

    async def _write(self, send: Send, facts: RequestFacts) -> None:
        chunks, add = self._chunks, self._chunks.add
        async with aclosing(self._pieces) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pinging = asyncio.create_task(_repeat(self._ping, send)) if self._ping else None
            try:
                if body := b"".join(map(event, chunks.begin())):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                async for answer, piece in pieces:
                    if body := b"".join(map(event, add(answer, piece))):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b"".join(map(event, chunks.end()))
            except Exception as error:
                body = event(facts.error_form(facts.failed(error)))
            finally:
                if pinging is not None:
                    pinging.cancel()
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


async def _repeat(body: bytes, send: Send) -> None:
    while True:
        await asyncio.sleep(PING_SECONDS)
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
