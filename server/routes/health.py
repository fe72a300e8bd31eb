"""GET /health, /health_generate, /ready and /version, for probes and operators. No API key is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from pilotfish import __version__
from pilotfish.server.encoding import described, json_response
from pilotfish.server.errors import ApiError, engine_dead
from pilotfish.server.service import ServiceDependency

router = APIRouter()


class Status(msgspec.Struct):
    status: str
    """A word, such as "alive", "ready", "draining", "model_loading" or "dead"."""
    reason: str | UnsetType = UNSET
    """Only if the status of HTTP is 503."""


_ANSWERS: dict[str, Any] = {
    "response_model": None,
    "responses": {200: described("It is.", Status), 503: described("It is not.", Status)},
}


@router.get("/health", **_ANSWERS)
async def health(service: ServiceDependency) -> Response:
    """Return 200 while the engine loads, runs or is restarted; 503 once it is dead and the server must be restarted."""
    if service.engine.state == "dead":
        return _status(503, "dead", engine_dead().message)
    return _status(200, "alive")


@router.get("/ready", **_ANSWERS)
async def ready(service: ServiceDependency) -> Response:
    """Return 200 while requests are accepted and the engine makes steps."""
    try:
        service.ready()
    except ApiError as error:
        return _unavailable(error)
    if service.draining:
        return _status(503, "draining", "An operator has taken this server out of rotation, by POST /drain.")
    if service.stuck:
        return _status(503, "stuck", "There are requests in flight, but the engine makes no steps.")
    return _status(200, "ready")


@router.get("/health_generate", **_ANSWERS)
async def health_generate(service: ServiceDependency) -> Response:
    """Return 200 once the engine has generated a token, for this probe or anybody else; 503 if it generates none for 20
    seconds, or cannot."""
    try:
        info = service.ready()
    except ApiError as error:
        return _unavailable(error)
    if not await service.probe.generates(info):
        return _status(503, "stuck", "The engine has generated no token.")
    return _status(200, "generates")


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


def _unavailable(error: ApiError) -> Response:
    return _status(503, error.code or "unavailable", error.message, error.retry_headers)


def _status(status: int, word: str, reason: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    return json_response(Status(word, UNSET if reason is None else reason), status, headers)
