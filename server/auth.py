"""API keys: "Authorization: Bearer KEY", as OpenAI's clients send it, compared in constant time."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pilotfish.server.errors import ApiError
from pilotfish.server.generation.facts import facts_of

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Paths that need no key: load balancers and Prometheus request them."""


class ApiKeys:
    """Refuses requests without one of `keys` with status 401, before the body is read. With no keys configured, every
    request is accepted."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self._keys:
            return await self._app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope).get("authorization", ""))
        if refusal is None:
            return await self._app(scope, receive, send)
        response = facts_of(scope).error_response(refusal)
        response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _refusal(self, authorization: str) -> ApiError | None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            message = "You didn't provide an API key: send it as the header 'Authorization: Bearer KEY'."
            return ApiError(401, message, code="invalid_api_key")
        key = given.strip().encode("latin-1", errors="replace")
        # All keys are compared, whichever matches, so that timing reveals nothing.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        return None if any(matches) else ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
