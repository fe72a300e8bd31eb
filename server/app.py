"""The FastAPI application: routes, middleware and errors around a Service. Who runs it is `server.serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import Route

from pilotfish import __version__
from pilotfish.engine.process.client import AsyncEngine
from pilotfish.server.auth import ApiKeys
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import install_handlers
from pilotfish.server.metrics import Metrics
from pilotfish.server.middleware import BodyLimit, RequestContext
from pilotfish.server.routes import chat, completions, health, metrics, models, tokenization
from pilotfish.server.service import Service
from pilotfish.server.tracing import Tracing
from pilotfish.text.tokenizer import Tokenizer


def create_app(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    stats: Metrics,
    names: tuple[str, ...],
    tracing: Tracing | None = None,
) -> FastAPI:
    """An application that serves `engine`, which its caller has made with `on_stats=stats.step`, and has started: so it
    can load while the rest is set up. `names`: what clients may call the model. `tracing` is its caller's to close.

    It answers while the engine loads (see /ready). When it is shut down, it stops the engine.
    `app.state.service.gate` closes it to new requests, and knows when the last is done.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="Pilotfish", version=__version__, lifespan=lifespan)
    app.state.service = Service(engine, tokenizer, config, stats, names)
    routers = [module.router for module in (completions, chat, models, tokenization, health, metrics)]
    for router in routers:
        app.include_router(router)
    install_handlers(app)
    # The last added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(ApiKeys, keys=config.keys())
    every = [route for router in (app, *routers) for route in router.routes]
    routes = frozenset(route.path for route in every if isinstance(route, Route) and "{" not in route.path)
    app.add_middleware(RequestContext, metrics=stats, routes=routes, tracing=tracing)
    return app
