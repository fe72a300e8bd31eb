"""GET /metrics, for Prometheus. No API key is needed."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from pilotfish.server.service import ServiceDependency

router = APIRouter()


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceDependency) -> Response:
    if service.engine.state in ("restarting", "dead"):
        service.metrics.engine_gone()
    elif service.engine.state == "stopping" or service.gate.closed:
        service.metrics.engine_stopping()
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
