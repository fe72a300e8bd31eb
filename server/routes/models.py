"""GET /v1/models and /v1/models/{id}: in Anthropic's form for clients that send its header, in OpenAI's for others."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import model_not_found
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.messages.errors import anthropic_error
from pilotfish.server.protocol.models import Model, ModelInfo, ModelList, ModelPage
from pilotfish.server.service import Service, ServiceDependency

ANTHROPIC = "anthropic-version"

router = APIRouter()


@router.get("/v1/models", **returns(ModelList))
async def list_models(request: Request, service: ServiceDependency) -> Response:
    if ANTHROPIC in request.headers:
        names = service.names
        return json_response(ModelPage([_info(service, name) for name in names], names[0], names[-1]))
    return json_response(all_models(service))


@router.get("/v1/models/{model:path}", **returns(Model))
async def get_model(model: str, request: Request, service: ServiceDependency) -> Response:
    if not model:  # /v1/models/
        return await list_models(request, service)
    anthropics = ANTHROPIC in request.headers
    if model not in service.names:
        if anthropics:
            facts_of(request.scope).error_form = anthropic_error
        raise model_not_found(model, service.names)
    return json_response(_info(service, model) if anthropics else _model(service, model))


def all_models(service: Service) -> ModelList:
    """Return the model under each of its names, and its adapters."""
    return ModelList(data=[_model(service, name) for name in service.names])


def _model(service: Service, name: str) -> Model:
    root, parent = service.engine.config.model, None
    if name in service.adapters:
        root, parent = name, service.names[0]
    return Model(id=name, created=service.created, root=root, parent=parent, max_model_len=_limit(service))


def _info(service: Service, name: str) -> ModelInfo:
    limit = _limit(service)
    return ModelInfo(name, name, datetime.fromtimestamp(service.created, UTC), limit, limit)


def _limit(service: Service) -> int | None:
    info = service.engine.info
    return None if info is None else info.max_model_len
