"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import model_not_found
from pilotfish.server.protocol.models import Model, ModelList
from pilotfish.server.service import Service, ServiceDependency

router = APIRouter()


@router.get("/v1/models", **returns(ModelList))
async def list_models(service: ServiceDependency) -> Response:
    return json_response(ModelList(data=[_model(service, name) for name in service.names]))


@router.get("/v1/models/{model:path}", **returns(Model))
async def get_model(model: str, service: ServiceDependency) -> Response:
    if not model:  # /v1/models/
        return await list_models(service)
    if model not in service.names:
        raise model_not_found(model, service.names)
    return json_response(_model(service, model))


def _model(service: Service, name: str) -> Model:
    info = service.engine.info
    limit = None if info is None else info.max_model_len
    return Model(id=name, created=service.created, root=service.engine.config.model, max_model_len=limit)
