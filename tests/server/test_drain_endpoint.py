"""/drain: balancers are sent away, and whoever comes all the same is served."""

from __future__ import annotations

import asyncio

import pytest

from pilotfish.server.config import ServerConfig
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

ALLOWED = ServerConfig(drain_endpoint=True)


async def test_a_drained_server_is_not_ready_and_still_serves() -> None:
    app = ScriptedApp(lambda request: say(request, [5]), ALLOWED)
    assert (await app.http.get("/drain")).json() == {"draining": False, "in_flight": 0}
    assert (await app.http.post("/drain")).json() == {"draining": True, "in_flight": 0}
    ready = await app.http.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert (await app.http.get("/health")).status_code == 200
    answer = await app.complete()
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert app.metric("pilotfish_draining") == 1
    assert (await app.http.delete("/drain")).json() == {"draining": False, "in_flight": 0}
    assert (await app.http.get("/ready")).status_code == 200
    assert "connection" not in (await app.complete()).headers
    assert app.metric("pilotfish_draining") == 0


async def test_it_can_be_waited_for() -> None:
    held = asyncio.Event()
    app = ScriptedApp(lambda request: [held, *say(request, [5])], ALLOWED)
    answer = asyncio.create_task(app.complete())
    await app.until_asked()
    assert (await app.http.post("/drain", params={"wait": 0.01})).json() == {"draining": True, "in_flight": 1}
    waiting = asyncio.create_task(app.http.post("/drain", params={"wait": 10}))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    held.set()
    assert (await waiting).json() == {"draining": True, "in_flight": 0}
    assert (await answer).status_code == 200


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "1e9"])
async def test_a_wrong_time_is_refused_and_named(wait: str) -> None:
    app = ScriptedApp(lambda request: [], ALLOWED)
    response = await app.http.post("/drain", params={"wait": wait})
    assert response.status_code == 400
    assert "wait" in response.json()["error"]["message"]
    assert (await app.http.get("/ready")).status_code == 200


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_only_where_it_is_allowed(method: str) -> None:
    app = ScriptedApp(lambda request: [])
    refused = await app.http.request(method, "/drain")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
    assert "--drain-endpoint" in refused.json()["error"]["message"]
    assert (await app.http.get("/ready")).status_code == 200
    app = ScriptedApp(lambda request: [], ServerConfig(drain_endpoint=True, api_key=("secret",)))
    assert (await app.http.request(method, "/drain")).status_code == 401
    key = {"authorization": "Bearer secret"}
    for origin in ("https://example.com", "null", "http://test:81"):
        refused = await app.http.request(method, "/drain", headers=key | {"origin": origin})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "other_origin")
        assert "access-control-allow-origin" not in refused.headers
    assert (await app.http.get("/ready")).status_code == 200
    assert (await app.http.request(method, "/drain", headers=key)).status_code == 200
