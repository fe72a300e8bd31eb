"""/health_generate: whether the engine generates."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pilotfish.server import probe
from pilotfish.server.config import ServerConfig
from tests.server.test_metrics import stats
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.GenerationProbe.generates, "__defaults__", (0.2,))


async def probed(app: ScriptedApp) -> tuple[int, str]:
    response = await app.http.get("/health_generate")
    return response.status_code, response.json()["status"]


async def test_a_token_is_generated_without_a_key() -> None:
    app = ScriptedApp(lambda request: say(request, [5]), ServerConfig(api_key=("secret",)))
    assert await probed(app) == (200, "generates")
    (asked,) = app.engine.requests
    assert (asked.params.max_tokens, asked.speculation) == (1, "off")
    assert app.metric("pilotfish_requests_total", outcome="length") == 0  # it is nobody's request
    assert app.engine.finished + app.engine.aborted == [asked.id]
    assert await probed(app) == (200, "generates")


async def test_an_engine_that_generates_nothing_is_found() -> None:
    app = ScriptedApp(lambda request: [asyncio.Event()])
    assert (await app.http.get("/ready")).status_code == 200
    assert await probed(app) == (503, "stuck")
    assert app.engine.aborted == [app.engine.requests[0].id]
    app.engine.script = lambda request: say(request, [5])
    assert await probed(app) == (200, "generates")


async def test_steps_without_tokens_are_not_enough() -> None:
    """And anybody's token is, while the engine is too busy for the probe."""
    app = ScriptedApp(lambda request: [asyncio.Event()])
    for generated, expected in ((0, (503, "stuck")), (3, (200, "generates"))):
        asking = asyncio.create_task(probed(app))
        await app.until_asked(1 + (generated > 0))
        app.metrics.step(stats(generated_tokens=generated))
        assert await asking == expected


async def test_many_probes_are_one_request() -> None:
    go = asyncio.Event()
    app = ScriptedApp(lambda request: [go, *say(request, [5])])
    asking = [asyncio.create_task(probed(app)) for _ in range(20)]
    await app.until_asked()
    await asyncio.sleep(0.05)
    go.set()
    assert await asyncio.gather(*asking) == [(200, "generates")] * 20
    assert len(app.engine.requests) == 1


@pytest.mark.parametrize(("state", "status"), [("starting", "model_loading"), ("dead", "engine_dead")])
async def test_it_is_as_unavailable_as_requests_are(state: str, status: str) -> None:
    app = ScriptedApp(lambda request: [])
    app.engine.state = state
    assert await probed(app) == (503, status)
    assert not app.engine.requests


async def test_an_engine_that_dies_meanwhile_generates_nothing() -> None:
    dying: Any = probe.EngineDeadError("gone")
    assert await probed(ScriptedApp(lambda request: [dying])) == (503, "stuck")
