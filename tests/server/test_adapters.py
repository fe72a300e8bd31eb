"""Low-rank adapters as clients see them: models with names of their own."""

from __future__ import annotations

import msgspec
import pytest

from pilotfish.engine.config import EngineConfig
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say


@pytest.fixture
def app() -> ScriptedApp:
    made = ScriptedApp(lambda request: say(request, [1]))
    made.engine.info = msgspec.structs.replace(INFO, adapters=("tuned", "other"))
    return made


async def test_a_request_chooses_an_adapter_as_its_model(app: ScriptedApp) -> None:
    for name, adapter in (("tiny", ""), ("tuned", "tuned"), ("other", "other")):
        for answer in (await app.complete(model=name), await app.chat(model=name)):
            assert answer.status_code == 200
            assert answer.json()["model"] == name
        assert [request.adapter for request in app.engine.requests[-2:]] == [adapter] * 2
    refused = await app.complete(model="none")
    assert refused.status_code == 404
    assert "'tiny' or 'tuned' or 'other'" in refused.json()["error"]["message"]


async def test_models_list_adapters_with_what_they_adapt(app: ScriptedApp) -> None:
    listed = (await app.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("tiny", None),
        ("tuned", "tiny"),
        ("other", "tiny"),
    ]
    assert (await app.http.get("/v1/models/tuned")).json()["parent"] == "tiny"
    assert (await app.http.get("/v1/models/none")).status_code == 404


async def test_adapters_are_changed_only_where_that_is_allowed(app: ScriptedApp) -> None:
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    refused = await app.http.post("/v1/load_lora_adapter", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
    assert "--lora-updates" in refused.json()["error"]["message"]
    app.engine.config = EngineConfig(model="tiny", lora_updates=True)
    for origin in ("https://example.com", "http://test:81", "null"):
        refused = await app.http.post("/v1/load_lora_adapter", json=body, headers={"origin": origin})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "other_origin")
        assert "access-control-allow-origin" not in refused.headers
        asked = {"origin": origin, "access-control-request-method": "POST"}
        preflight = await app.http.options("/v1/load_lora_adapter", headers=asked)
        assert "access-control-allow-origin" not in preflight.headers
    own = await app.http.post("/v1/load_lora_adapter", json=body, headers={"origin": "http://test"})
    assert [model["id"] for model in own.json()["data"]] == ["tiny", "tuned", "other", "new"]
    assert (await app.complete(model="new")).status_code == 200
    left = await app.http.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"})
    assert [model["id"] for model in left.json()["data"]] == ["tiny", "other", "new"]
    assert (await app.complete(model="tuned")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param", "named"),
    [
        (
            "load",
            {"lora_name": "tuned", "lora_path": "x"},
            "lora_name",
            "'tuned', but must be a name that is not",
        ),
        ("load", {"lora_name": "tiny", "lora_path": "x"}, "lora_name", "not taken"),
        ("load", {"lora_name": "", "lora_path": "x"}, "lora_name", "not taken"),
        ("load", {"lora_name": "new", "lora_path": "broken"}, "lora_path", "no adapter is in 'broken'"),
        ("load", {"lora_name": "new"}, "lora_path", "lora_path"),
        ("unload", {"lora_name": "new"}, "lora_name", "the adapters that are loaded are 'tuned', 'other'"),
    ],
)
async def test_changes_that_cannot_be(
    app: ScriptedApp, path: str, body: dict[str, str], param: str, named: str
) -> None:
    app.engine.config = EngineConfig(model="tiny", lora_updates=True)
    refused = await app.http.post(f"/v1/{path}_lora_adapter", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert named in refused.json()["error"]["message"]
