"""CORS, which lets pages of other origins use the API, and HEAD on every path that takes GET."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.server.errors import ApiError

SHARED_PREFIX = "/v1/"
SHARED_PATHS = frozenset({
    "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/health_generate", "/ready", "/version", "/metrics",
    "/openapi.json",
})  # fmt: skip
"""With those below SHARED_PREFIX, the paths that pages of other origins may use: none that change the server."""

OWN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Paths below SHARED_PREFIX that change the server."""

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_EXPOSED = ("x-request-id", "request-id", "x-session-id", "warning", "retry-after", "retry-after-ms")


def check_own_origin(request: Request, what: str) -> None:
    """Raise ApiError 403 for a page of another origin, which may not do `what`."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, f"Pages of other origins cannot {what}.", code="other_origin")


class CrossOrigin:
    """Answers preflights, which carry no API key, and marks the answers for the configured origins ("*": all). Never
    with credentials: a page cannot use cookies or a password that a browser keeps."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._shared = CORSMiddleware(
            app, allow_origins=tuple(origins), allow_methods=_METHODS, allow_headers=("*",), expose_headers=_EXPOSED
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shared = scope["type"] == "http" and (scope["path"].startswith(SHARED_PREFIX) or scope["path"] in SHARED_PATHS)
        shared = shared and scope["path"] not in OWN_PATHS
        await (self._shared if shared else self._app)(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
