"""The FastAPI application: routes, middleware and errors around a Service. `server.serve` runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Route

from pilotfish import __version__
from pilotfish.engine.process.supervisor import SupervisedEngine
from pilotfish.server.auth import Authentication
from pilotfish.server.bodies import LARGE_BODY, BodyBudget, BodyRoute
from pilotfish.server.browsers import CrossOrigin, HeadAsGet
from pilotfish.server.compression import Decompress
from pilotfish.server.config import NO_ORIGINS, ServerConfig
from pilotfish.server.encoding import ErrorBody, describe, returns
from pilotfish.server.generation.events import ClientGoneError, until_disconnect
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.generation.flow import Endpoint, generate
from pilotfish.server.keys import KeyRing
from pilotfish.server.metrics import Metrics
from pilotfish.server.middleware import BodyLimit, RequestContext, install_handlers
from pilotfish.server.paths import TidyPaths
from pilotfish.server.protocol.loads import Loads
from pilotfish.server.protocol.messages_out import TokenCount
from pilotfish.server.protocol.models import Model, ModelList
from pilotfish.server.protocol.responses_out import DeletedResponse, InputItems
from pilotfish.server.protocol.tokenization import Detokenized, Tokenized, TokenizerInfo
from pilotfish.server.routes import (
    ENDPOINTS,
    adapters,
    draining,
    health,
    loads,
    messages,
    metrics,
    models,
    page,
    responses,
    tokenization,
)
from pilotfish.server.service import Service, ServiceDependency
from pilotfish.server.telemetry.recent import RecentRequests
from pilotfish.server.telemetry.tracing import Tracing
from pilotfish.text.tokenizer import Tokenizer


def create_app(
    engine: SupervisedEngine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    stats: Metrics,
    names: tuple[str, ...],
    tracing: Tracing | None = None,
    endpoints: Sequence[Endpoint[Any]] = ENDPOINTS,
) -> FastAPI:
    """Make the application that serves `engine`, which the caller has created with the events of `stats` and started.
    `names` are the model's names for clients; the caller closes `tracing`.

    The application answers while the engine loads (see /ready), and stops the engine at shutdown.
    `app.state.service.gate` closes it to new requests and tells when the last one is done.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            app.state.service.close()
            await engine.stop()

    app = FastAPI(title="Pilotfish", version=__version__, lifespan=lifespan)
    app.router.route_class = BodyRoute
    ring = app.state.keys = KeyRing(config.api_key, config.api_key_file)
    service = app.state.service = Service(engine, tokenizer, config, stats, names)
    routers = [
        module.router
        for module in (messages, models, loads, adapters, responses, tokenization, health, draining, metrics)
    ]
    if config.page:
        routers.append(page.router)
    for endpoint in endpoints:
        add_endpoint(app, endpoint)
    for router in routers:
        app.include_router(router)
    own = [type_ for endpoint in endpoints for type_ in (endpoint.response_type, endpoint.error_type)]
    others = (TokenCount, Model, ModelList, Loads, Tokenized, Detokenized, TokenizerInfo)
    describe(app, [*own, *others, DeletedResponse, InputItems, ErrorBody, health.Status, draining.Draining])
    every = [route for router in (app, *routers) for route in router.routes]
    paths = [route.path for route in every if isinstance(route, Route) and "{" not in route.path]
    install_handlers(app, paths)
    # The last added is the outermost.
    app.add_middleware(
        BodyBudget, limit=max(config.max_bodies_bytes, config.max_body_bytes), reclaimer=app.state.service.reclaimer
    )
    app.add_middleware(Decompress, limit=config.max_body_bytes)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(Authentication, ring=ring, tenant_header=config.tenant_header)
    app.add_middleware(HeadAsGet)
    by_path = {endpoint.path: endpoint for endpoint in endpoints}
    recent = app.state.recent = RecentRequests() if config.page else None
    app.add_middleware(
        RequestContext, metrics=stats, routes=paths, endpoints=by_path, tracing=tracing, recent=recent,
        draining=lambda: service.draining,
    )  # fmt: skip
    if config.cors_origins != NO_ORIGINS:
        app.add_middleware(CrossOrigin, origins=config.cors_origins)
    app.add_middleware(TidyPaths, paths=paths)
    return app


def add_endpoint(app: FastAPI, endpoint: Endpoint[Any]) -> None:
    """Add the route of an endpoint."""

    async def create(body: Any, request: Request, service: ServiceDependency) -> Response:
        if facts_of(request.scope).body_bytes < LARGE_BODY:
            return await generate(endpoint, body, request, service)
        try:  # else it would be prepared for nobody
            return await until_disconnect(request.receive, generate(endpoint, body, request, service))
        except ClientGoneError:
            return Response(status_code=499)

    create.__name__ = endpoint.name
    create.__annotations__["body"] = endpoint.request_type
    app.add_api_route(
        endpoint.path, create, methods=["POST"], **returns(endpoint.response_type, endpoint.error_type, streams=True)
    )
