"""API keys, "Authorization: Bearer KEY" as OpenAI's clients send it or "x-api-key: KEY" as Anthropic's do, and the
tenant that follows from them (see `server.tenants`)."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pilotfish.server.errors import ApiError
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.keys import KeyRing
from pilotfish.server.tenants import MAX_TENANT_LENGTH, ApiKey, find_key, tenant_of

OPEN_PATHS = frozenset({
    "/health", "/health_generate", "/ready", "/metrics", "/version",
    "/", "/page/app.js", "/page/app.css", "/page/licenses.txt",
})  # fmt: skip
"""Paths that need no key: load balancers and Prometheus request them, and browsers the page, which asks for the key."""
PAGE_PREFIX = "/page/"
"""What the page asks for."""


class Authentication:
    """Refuses requests without one of the keys of `ring` with status 401, before the body is read, and records the
    tenant of the others. With no keys configured, every request is accepted. `tenant_header` may name tenants, too."""

    def __init__(self, app: ASGIApp, ring: KeyRing, tenant_header: str | None = None) -> None:
        self._app = app
        self._ring = ring
        self._tenant_header = tenant_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        headers, facts = Headers(scope=scope), facts_of(scope)
        try:
            key = self._key(headers) if self._ring.keys else None
            facts.tenant, facts.key = tenant_of(key, self._named(headers)), key
        except ApiError as refusal:
            response = facts.error_response(refusal)
            if refusal.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _key(self, headers: Headers) -> ApiKey:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        given = given or headers.get("x-api-key", "").strip()
        if not given:
            message = "You didn't provide an API key: send it as the header 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key")
        if (key := find_key(self._ring.keys, given.encode("latin-1", errors="replace"))) is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return key

    def _named(self, headers: Headers) -> str | None:
        """Return the tenant in the header, if it is configured and sent. Raises ApiError for one that is not clear."""
        name = self._tenant_header
        if name is None or not (values := set(filter(None, map(str.strip, headers.getlist(name))))):
            return None
        value = values.pop()
        if values or len(value) > MAX_TENANT_LENGTH:
            message = f"The header {name!r} must name one tenant, in at most {MAX_TENANT_LENGTH} characters."
            raise ApiError(400, message, param=name, code="invalid_value")
        return value
