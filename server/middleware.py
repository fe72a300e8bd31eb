"""Request ids, error responses, and the limit on the size of bodies. API keys are in `server.auth`.

Middleware here is pure ASGI: Starlette's BaseHTTPMiddleware puts a queue and a task between route and client, which
slows down every chunk of a stream and hides that the client has disconnected.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.errors import EngineDeadError, EngineNotReadyError, ParameterError
from pilotfish.server.errors import ApiError, ErrorForm, openai_error, unknown_url
from pilotfish.server.generation.facts import RequestFacts, facts_of
from pilotfish.server.generation.flow import Endpoint
from pilotfish.server.metrics import Metrics
from pilotfish.server.paths import meant
from pilotfish.server.telemetry.recent import RecentRequests
from pilotfish.server.telemetry.request_log import log_request
from pilotfish.server.telemetry.tracing import Tracing

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
CLIENT_GONE = 499
"""nginx's status for a request whose client closed the connection."""
WARNED_NAMES = 8
WARNED_LENGTH = 64
OTHER_ROUTE = "other"
SESSION_HEADER = "x-session-id"
ROUTING_KEY_HEADER = "x-smg-routing-key"
"""By which smg keeps a session on one replica, and the only name of it that smg passes on."""
MODELS_PATH = "/v1/models"
MODEL_ROUTE = f"{MODELS_PATH}/{{id}}"


class RequestContext:
    """Gives each request its facts, with an id (the client's x-request-id, if valid) that the response repeats; answers
    unexpected exceptions with status 500; counts, logs and traces each response. `routes` are the application's paths,
    `endpoints` the endpoints that generate text, by path. While it is `draining`, connections are closed after their
    answers, so that clients come to another replica. Outside of it are only CORS and the tidying of paths.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Collection[str],
        endpoints: Mapping[str, Endpoint[Any]],
        tracing: Tracing | None = None,
        recent: RecentRequests | None = None,
        draining: Callable[[], bool] = bool,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._endpoints = endpoints
        self._tracing = tracing
        self._recent = recent
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope)
        session = _sane(given, SESSION_HEADER) or _sane(given, ROUTING_KEY_HEADER)
        facts = RequestFacts(_sane(given, "x-request-id") or f"req-{uuid.uuid4().hex}", session)
        facts.error_form = self._error_form(scope["path"])
        facts.put_into(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = facts.request_id  # OpenAI's name, and Anthropic's
                if facts.session is not None:
                    headers[SESSION_HEADER] = facts.session
                if self._draining():
                    headers["connection"] = "close"
                if facts.ignored:
                    headers["warning"] = _warning(facts.ignored)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = facts.error_response(error)
            if status == 0:
                await response(scope, receive, send_with_id)
        finally:
            self._ended(scope, facts, status or CLIENT_GONE)

    def _ended(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        route, now = self._route(scope["path"]), time.monotonic()
        if status >= 400 and facts.generation is None and scope["path"] in self._endpoints:
            self._metrics.refused()
        self._metrics.responded(route, status)
        trace_id = None
        if self._tracing is not None:
            trace_id = self._tracing.record(scope, route, status, now)
        if self._recent is not None:
            self._recent.add(route, facts, status, now - facts.arrival)
        log_request(scope, status, now - facts.arrival, trace_id)

    def _error_form(self, path: str) -> ErrorForm:
        """Return the form of errors of the endpoint at a path or above it, so that also those have it that come before
        the route is known, or because there is none."""
        for own, endpoint in self._endpoints.items():
            if path == own or path.startswith(f"{own}/"):
                return endpoint.error_form
        return openai_error

    def _route(self, path: str) -> str:
        """Return the path of the route: a client's own string must not become a label."""
        if path in self._routes:
            return path
        return MODEL_ROUTE if path.startswith(f"{MODELS_PATH}/") else OTHER_ROUTE


def install_handlers(app: FastAPI, paths: Collection[str]) -> None:
    """Answer the known errors of routes in the endpoint's form; RequestContext handles all others. `paths` are the
    application's."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            error = unknown_url(meant(request.scope["path"], paths))
        response = facts_of(request.scope).error_response(error)
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    for kind in (
        ApiError, ParameterError, EngineNotReadyError, EngineDeadError, HTTPException, RequestValidationError,
    ):  # fmt: skip
        app.add_exception_handler(kind, handle)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes with status 413, before reading them if the length is declared."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            return await facts_of(scope).error_response(self._refusal())(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise HTTPException(413, self._refusal().message)  # FastAPI would turn others into 400
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        message = f"The request's body is larger than the {self._limit} bytes that this server accepts."
        return ApiError(413, message, code="body_too_large")


def _warning(ignored: tuple[str, ...]) -> str:
    """Return the value of a Warning header (RFC 7234, 5.5) that names the fields of a request that were ignored."""
    names = [name[:WARNED_LENGTH].encode("unicode_escape").decode() for name in ignored[:WARNED_NAMES]]
    more = f" and {len(ignored) - WARNED_NAMES} more" if len(ignored) > WARNED_NAMES else ""
    text = f"unknown fields were ignored: {', '.join(names)}{more}"
    return '299 - "{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))


def _sane(headers: Headers, name: str) -> str | None:
    """Return a header's value if it is an id that may be repeated in headers and logs."""
    own = headers.get(name, "")
    return own if _SANE_ID.fullmatch(own) else None
