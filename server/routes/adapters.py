"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: only with --lora-updates, and never for
pages of other origins."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pilotfish.errors import ParameterError
from pilotfish.server.bodies import BodyRoute
from pilotfish.server.browsers import check_own_origin
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from pilotfish.server.protocol.models import ModelList
from pilotfish.server.protocol.unknown import unknown_fields
from pilotfish.server.routes.models import all_models
from pilotfish.server.service import Service, ServiceDependency

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/load_lora_adapter", **returns(ModelList))
async def load(body: LoadAdapterRequest, request: Request, service: ServiceDependency) -> Response:
    """Load a low-rank adapter from a folder of this machine. Returns the models that are served now."""
    return await _changed(service, request, body, body.lora_path)


@router.post("/v1/unload_lora_adapter", **returns(ModelList))
async def unload(body: UnloadAdapterRequest, request: Request, service: ServiceDependency) -> Response:
    """Take an adapter away: requests that have it go on to their ends. Returns the models that are served now."""
    return await _changed(service, request, body, None)


async def _changed(
    service: Service, request: Request, body: LoadAdapterRequest | UnloadAdapterRequest, folder: str | None
) -> Response:
    service.ready()
    facts_of(request.scope).ignored = unknown_fields(body, service.config.strict_requests)
    check_own_origin(request, "change adapters")
    if not service.engine.config.lora_updates:
        raise ApiError(403, "Adapters cannot be changed: start the server with --lora-updates.", code="not_allowed")
    name = body.lora_name
    if not name or (folder is not None and name in service.names):
        raise bad_parameter("lora_name", f"lora_name is {name!r}, but must be a name that is not taken yet")
    if folder is None and name not in service.adapters:
        known = ", ".join(map(repr, service.adapters)) or "none"
        raise bad_parameter("lora_name", f"lora_name is {name!r}, but the adapters that are loaded are {known}")
    try:
        await service.engine.change_adapter(name, folder)
    except ParameterError as error:
        raise bad_parameter(error.param, error.message) from None
    return json_response(all_models(service))
