"""Pure ASGI middleware: request ids, the last line of defence against exceptions, and the limit on a body's size.

Pure, because Starlette's BaseHTTPMiddleware puts a queue and a task between a route and its client, which costs time
for every chunk of a stream and hides that the client has gone. API keys are in `server.auth`.
"""

from __future__ import annotations

import re
import time
import uuid

from fastapi.exceptions import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.server.errors import ApiError, as_api_error
from pilotfish.server.metrics import Metrics
from pilotfish.server.request_log import log_request
from pilotfish.server.tracing import Tracing

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
CLIENT_GONE = 499
"""The status of a request that nobody waits for any more, as nginx has it."""
OTHER_ROUTE = "other"
MODELS_PATH = "/v1/models"
MODEL_ROUTE = f"{MODELS_PATH}/{{id}}"
GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})


class RequestContext:
    """The outermost: gives each request an id (the client's own x-request-id, if it is sane), which every response
    carries, and a time of arrival; answers 500 where a route raised what nobody expected; counts, logs and traces what
    was answered. `routes` are the paths that there are.

    `scope["state"]` has `request_id`, `arrival` (time.monotonic() seconds) and `admitted` (given to the engine, set by
    `Service.note` with what else is to be told of a request); `error`, a code, where one was the answer.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: frozenset[str] = frozenset(), tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "arrival": time.monotonic(), "admitted": False}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            api_error = as_api_error(error, request_id)
            state["error"] = api_error.code
            if status == 0:
                await api_error.response(scope, receive, send_with_id)
        finally:
            self._ended(scope, status or CLIENT_GONE)

    def _ended(self, scope: Scope, status: int) -> None:
        state, route, now = scope["state"], self._route(scope["path"]), time.monotonic()
        if status >= 400 and not state["admitted"] and scope["path"] in GENERATION_PATHS:
            self._metrics.refused()
        self._metrics.responded(route, status)
        trace_id = None
        if self._tracing is not None:
            trace_id = self._tracing.record(scope, route, status, state["arrival"], now)
        log_request(scope, status, now - state["arrival"], trace_id)

    def _route(self, path: str) -> str:
        """The route's own path: a client's must not become a label."""
        if path in self._routes:
            return path
        return MODEL_ROUTE if path.startswith(f"{MODELS_PATH}/") else OTHER_ROUTE


class BodyLimit:
    """Refuses a body of more than `limit` bytes with status 413, before it is read if it says how long it is."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            scope["state"]["error"] = self._refusal().code
            return await self._refusal().response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise HTTPException(413, self._refusal().message)  # FastAPI lets this kind through
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        message = f"The request's body is larger than the {self._limit} bytes that this server takes."
        return ApiError(413, message, code="body_too_large")


def _request_id(headers: Headers) -> str:
    own = headers.get("x-request-id", "")
    return own if _SANE_ID.fullmatch(own) else f"req-{uuid.uuid4().hex}"
