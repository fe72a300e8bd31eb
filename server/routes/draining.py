"""/drain: out of a balancer's rotation and back, without ending anything. POST and DELETE only with --drain-endpoint,
and never for pages of other origins."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from pilotfish.server.browsers import check_own_origin
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import ApiError
from pilotfish.server.service import Service, ServiceDependency

LONGEST_WAIT = 86400.0

router = APIRouter()


class Draining(msgspec.Struct):
    draining: bool
    """Whether /ready answers 503, so that balancers send nothing more. What comes all the same is served."""
    in_flight: int
    """Answers that are not complete yet; with `draining` and 0, the server can be stopped without a loss."""


@router.get("/drain", **returns(Draining))
async def state(service: ServiceDependency) -> Response:
    return _state(service)


@router.post("/drain", **returns(Draining))
async def drain(
    request: Request, service: ServiceDependency, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0.0
) -> Response:
    """Have /ready answer 503, and connections closed after their answers. Returns when nothing is in flight, or after
    `wait` seconds."""
    _check_allowed(request, service)
    service.drain(True)
    await service.gate.wait_idle(wait)
    return _state(service)


@router.delete("/drain", **returns(Draining))
async def undrain(request: Request, service: ServiceDependency) -> Response:
    """Have /ready answer 200 again."""
    _check_allowed(request, service)
    service.drain(False)
    return _state(service)


def _check_allowed(request: Request, service: Service) -> None:
    check_own_origin(request, "drain the server")
    if not service.config.drain_endpoint:
        message = "The server cannot be drained by requests: start it with --drain-endpoint."
        raise ApiError(403, message, code="not_allowed")


def _state(service: Service) -> Response:
    return json_response(Draining(service.draining, service.gate.in_flight))
