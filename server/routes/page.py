"""GET / for browsers, and what the page there asks for: its files, what the server is, the engine live, and recent
requests. Its sources are in web/, its built files in server/page/. `--no-page` leaves all of it out."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pilotfish import __version__
from pilotfish.server.encoding import json_response
from pilotfish.server.errors import ApiError, unknown_url
from pilotfish.server.generation.events import ClientGoneError, event, until_disconnect
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.service import Service, ServiceDependency
from pilotfish.server.telemetry.live import LiveSums
from pilotfish.server.telemetry.recent import RecentRequest, RecentRequests

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {"app.js": "text/javascript", "app.css": "text/css", "licenses.txt": "text/plain"}
"""The page's files beside index.html."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECONDS = 0.5
"""Between two states of the live view."""


class PageInfo(msgspec.Struct):
    version: str
    state: str
    models: tuple[str, ...]
    drafters: tuple[str, ...]
    default_drafter: str
    max_model_len: int
    log_prompts: bool
    grafana_url: str | None


class Recent(msgspec.Struct):
    requests: list[RecentRequest]


async def own_page(request: Request) -> None:
    """Refuse pages of other origins, as far as their browser says so; without CORS none could read the answer."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, "Only the server's own page may ask for this.", code="other_origin")


router = APIRouter(include_in_schema=False)
OwnPage = Annotated[None, Depends(own_page)]


@router.api_route("/", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
async def page(request: Request) -> Response:
    """Return the page to browsers; to others the error of an unknown URL."""
    if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
        raise unknown_url()
    return _file(request, "index.html", "text/html")


@router.get("/page/info")
async def info(service: ServiceDependency, own: OwnPage) -> Response:
    engine, found = service.engine, service.engine.info
    state = "stopping" if service.gate.closed and engine.state == "ready" else engine.state
    drafters, default, limit = (
        ((), "", 0) if found is None else (found.drafters, found.default_drafter, found.max_model_len)
    )
    config = service.config
    return json_response(
        PageInfo(__version__, state, service.names, drafters, default, limit, config.log_prompts, config.grafana_url)
    )


@router.get("/page/live")
async def live(service: ServiceDependency, own: OwnPage) -> Response:
    return _LiveStream(service)


@router.get("/page/requests")
async def requests(request: Request, own: OwnPage) -> Response:
    recent: RecentRequests = request.app.state.recent
    return json_response(Recent(recent.of_tenant(facts_of(request.scope).tenant)))


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    if name not in TYPES:
        raise unknown_url()
    return _file(request, name, TYPES[name])


@cache
def _read(name: str) -> tuple[bytes, str]:
    content = (FOLDER / name).read_bytes()
    return content, f'"{sha256(content).hexdigest()[:20]}"'


def _file(request: Request, name: str, media_type: str) -> Response:
    content, tag = _read(name)
    headers = {
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "etag": tag,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "vary": "accept",
    }
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


class _LiveStream(Response):
    """The engine's state as server-sent events, until the client goes or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, service: Service) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(ClientGoneError):
            await until_disconnect(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        service, sums = self._service, LiveSums()
        watchers = service.metrics.watchers
        watchers.append(sums.step)
        try:
            since = time.monotonic()
            while not service.gate.closed:
                await asyncio.sleep(SECONDS)
                now, engine = time.monotonic(), service.engine
                most = 0 if engine.info is None else engine.info.max_num_seqs
                state = sums.take(engine.state, now - since, service.gate.in_flight, most)
                if not state.blocks_total and engine.info is not None:  # no step yet
                    state.blocks_total = engine.info.num_blocks
                since = now
                await send({"type": "http.response.body", "body": event(state), "more_body": True})
        finally:
            watchers.remove(sums.step)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
