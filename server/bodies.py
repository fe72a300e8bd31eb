"""Large request bodies: their memory together is bounded, and they are parsed and validated off the event loop.

A small body takes FastAPI's own way. A large one is parsed by msgspec, several times as fast as `json`, during which no
other thread runs; validation lets others run. Its bytes are freed once it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.server.errors import ApiError, bodies_full
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.memory import Reclaimer
from pilotfish.server.offload import Offload

LARGE_BODY = 2**16
"""Bytes from which a body is large: it takes about 1 ms at most to parse and validate."""
MAX_CONTAINERS = 2**16
"""Objects and arrays in a body; each message of a conversation is one or more, and takes a kilobyte."""
MAX_STRINGS = 2**18
MAX_VALUES = 2**20
"""Values in a body, most of them token ids, which take 50 ms to parse."""
RETRY_SECONDS = 1
_READ_ALREADY = b"?"


class BodyBudget:
    """Refuses bodies with status 429 while those of all requests in flight have more than `limit` bytes together. The
    bytes of a request count until its answer is complete, since what was parsed of them is kept that long."""

    def __init__(self, app: ASGIApp, limit: int, reclaimer: Reclaimer) -> None:
        self._app = app
        self._limit = limit
        self._reclaimer = reclaimer
        self._used = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        facts = facts_of(scope)

        async def counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                if self._used + size > self._limit:  # as an HTTPException: FastAPI would turn others into 400
                    raise HTTPException(429, self._full(), {"retry-after": str(RETRY_SECONDS)})
                self._used += size
                if facts.body_bytes < LARGE_BODY <= facts.body_bytes + size:
                    large.enter_context(self._reclaimer.large())
                facts.body_bytes += size
            return message

        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and self._used + int(length) > self._limit:
            return await facts.error_response(bodies_full(self._full(), RETRY_SECONDS))(scope, receive, send)
        with ExitStack() as large:
            try:
                await self._app(scope, counted, send)
            finally:
                self._used -= facts.body_bytes

    def _full(self) -> str:
        return (
            f"The bodies of the requests in flight have together the {self._limit} bytes that this server holds, or "
            "would with this one. Try again later."
        )


class BodyRoute(APIRoute):
    """A route whose large bodies are read by `_LargeBody`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        kind = None if self.body_field is None else self.body_field.field_info.annotation
        if not isinstance(kind, type) or not issubclass(kind, BaseModel):
            return handle

        async def handler(request: Request) -> Response:
            own = _LargeBody(request, kind)
            try:
                return await handle(own)
            except HTTPException:
                if own.invalid is not None:
                    raise own.invalid from None
                raise

        return handler


class _LargeBody(Request):
    """A request that parses and validates a large body in a thread: FastAPI finds it validated."""

    def __init__(self, request: Request, kind: type[BaseModel]) -> None:
        super().__init__(request.scope, request.receive)
        self._kind = kind
        self._offload: Offload = request.app.state.service.offload
        self._raw: bytes | None = None
        self.invalid: RequestValidationError | ApiError | None = None
        """What FastAPI would turn into an error without a reason."""

    async def body(self) -> bytes:
        raw = await super().body()
        if len(raw) < LARGE_BODY:
            return raw
        self._raw, self._body = raw, _READ_ALREADY  # the caller holds what it gets until the answer is complete
        return self._body

    async def json(self) -> Any:
        if self._raw is None:
            return await super().json()
        raw, self._raw = [self._raw], None
        try:
            return await self._offload.run(_validated, raw, self._kind)
        except (RequestValidationError, ApiError) as error:
            self.invalid = error
            raise HTTPException(400) from None


def _validated(holder: list[bytes], kind: type[BaseModel]) -> BaseModel:
    """Return the validated body that is taken out of `holder`. Raises RequestValidationError, and as `parse`."""
    data = parse(holder.pop())
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]) from None


def parse(raw: bytes) -> Any:
    """Return the JSON value of a body. Raises ApiError 400 for one of too many values, and what `json` does."""
    if (problem := too_many(raw)) is not None:
        raise ApiError(400, problem, code="too_many_values")
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return json.loads(raw)  # takes what is not JSON, such as NaN, and says where a body is wrong


def too_many(raw: bytes) -> str | None:
    """Return the complaint about a body of too many values: millions of them take seconds, and a gigabyte."""
    if json.detect_encoding(raw) not in ("utf-8", "utf-8-sig"):
        return "The request's body must be UTF-8."
    if _containers(raw) <= MAX_CONTAINERS and raw.count(b",") <= MAX_VALUES and raw.count(b'"') <= 2 * MAX_STRINGS:
        return None
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > 2 * MAX_STRINGS:
        return f"The request's body has more than {MAX_STRINGS} strings."
    bare = b"".join(bare.split(b'"')[::2])
    if _containers(bare) > MAX_CONTAINERS:
        return f"The request's body has more than {MAX_CONTAINERS} objects and arrays."
    if bare.count(b",") > MAX_VALUES:
        return f"The request's body has more than {MAX_VALUES} values."
    return None


def _containers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")
