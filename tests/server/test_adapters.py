"""Low-rank adapters as clients see them: models with names of their own."""

from __future__ import annotations

import msgspec
import pytest

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
    assert "'tiny', 'tuned', 'other'" in refused.json()["error"]["message"]


async def test_models_list_adapters_with_what_they_adapt(app: ScriptedApp) -> None:
    listed = (await app.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("tiny", None),
        ("tuned", "tiny"),
        ("other", "tiny"),
    ]
    assert (await app.http.get("/v1/models/tuned")).json()["parent"] == "tiny"
    assert (await app.http.get("/v1/models/none")).status_code == 404
