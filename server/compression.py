"""Compressed request bodies: gzip and deflate, decompressed as they arrive, and never to more than a body may have.

A few kilobytes can become megabytes: they are decompressed piece by piece, and others have their turn in between.
"""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.server.errors import ApiError
from pilotfish.server.generation.facts import facts_of

ENCODINGS = ("gzip", "deflate")
_EITHER = 32 + zlib.MAX_WBITS
"""zlib finds out by itself whether data has gzip's header or zlib's, which "deflate" means."""
_GZIP = frozenset({"gzip", "x-gzip", "deflate"})
_PIECE = 2**18
"""Bytes that are decompressed at a time, in less than a millisecond."""


class Decompress:
    """Decompresses bodies; refuses other encodings with status 415, more than `limit` decompressed bytes with 413."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        encoding = Headers(scope=scope).get("content-encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return await self._app(scope, receive, send)
        if encoding not in _GZIP:
            return await facts_of(scope).error_response(_unknown(encoding))(scope, receive, send)
        body = _Body(zlib.decompressobj(_EITHER), self._limit)

        async def decompressed() -> Message:
            if body.has_more:
                await asyncio.sleep(0)
                return {"type": "http.request", "body": body.next(), "more_body": body.has_more or not body.ended}
            message = await receive()
            if message["type"] != "http.request":
                return message
            plain = body.add(message.get("body", b""), last=not message.get("more_body", False))
            return {**message, "body": plain, "more_body": body.has_more or not body.ended}

        await self._app(scope, decompressed, send)


class _Body:
    """Raises HTTPException where the body cannot be taken: FastAPI would turn others into 400."""

    def __init__(self, stream: zlib._Decompress, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._size = 0
        self.ended = False
        """Whether all of the compressed body is here."""
        self.has_more = False
        """Whether more can be decompressed of what is here."""

    def add(self, data: bytes, last: bool) -> bytes:
        """Take the next part of the compressed body, and return the first piece of what it adds."""
        self.ended = last
        return self._decompress(data)

    def next(self) -> bytes:
        return self._decompress(self._stream.unconsumed_tail)

    def _decompress(self, data: bytes) -> bytes:
        size = min(_PIECE, self._limit - self._size + 1)
        try:
            plain = self._stream.decompress(data, size)
        except zlib.error:
            raise HTTPException(400, "The request's body is not in the encoding that Content-Encoding names.") from None
        self._size += len(plain)
        if self._size > self._limit:
            message = f"The request's body, decompressed, is larger than the {self._limit} bytes that are accepted."
            raise HTTPException(413, message)
        if self._stream.unused_data:
            raise HTTPException(400, "The request's body goes on after the end of its compressed data.")
        self.has_more = not self._stream.eof and (bool(self._stream.unconsumed_tail) or len(plain) == size)
        if self.ended and not self.has_more and not self._stream.eof:
            raise HTTPException(400, "The request's body ends before its compressed data does.")
        return plain


def _unknown(encoding: str) -> ApiError:
    known = " or ".join(ENCODINGS)
    message = f"The request's body has Content-Encoding {encoding!r}, but must be plain, or have {known}."
    return ApiError(415, message, param="content-encoding", code="unsupported_encoding")
