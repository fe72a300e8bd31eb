"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter

from pilotfish.server.errors import model_not_found
from pilotfish.server.protocol.responses import Model, ModelList
from pilotfish.server.service import Service, ServiceDependency

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: ServiceDependency) -> ModelList:
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, service: ServiceDependency) -> Model:
    if model not in service.names:
        raise model_not_found(model, service.names)
    return _model(service, model)


def _model(service: Service, name: str) -> Model:
    info = service.engine.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pilotfish",
        "root": service.engine.config.model,
        "max_model_len": None if info is None else info.max_model_len,
    }
