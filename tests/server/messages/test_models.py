"""/v1/models for Anthropic's client, which tells itself by a header."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import ModelInfo

from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say


@pytest.fixture
def served() -> ScriptedApp:
    return ScriptedApp(lambda request: say(request, [5]))


@pytest.fixture
def client(served: ScriptedApp) -> anthropic.AsyncAnthropic:
    transport: Any = httpx2.ASGITransport(served.app)
    http = httpx2.AsyncClient(transport=transport)
    return anthropic.AsyncAnthropic(base_url="http://test", api_key="none", max_retries=0, http_client=http)


async def test_it_finds_the_models(client: anthropic.AsyncAnthropic) -> None:
    async with client:
        listed = [model async for model in client.models.list()]
        (model,) = listed
        assert model == await client.models.retrieve("tiny")
    ModelInfo.model_validate(model.model_dump())
    assert (model.id, model.display_name, model.type) == ("tiny", "tiny", "model")
    assert (model.max_input_tokens, model.max_tokens) == (INFO.max_model_len, INFO.max_model_len)
    assert isinstance(model.created_at, datetime)


async def test_a_model_that_is_not_served(client: anthropic.AsyncAnthropic) -> None:
    async with client:
        with pytest.raises(anthropic.NotFoundError, match="'tiny'") as caught:
            await client.models.retrieve("claude")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert caught.value.request_id == caught.value.body["request_id"]


async def test_others_get_openais_form(served: ScriptedApp) -> None:
    assert (await served.http.get("/v1/models")).json()["object"] == "list"
    assert set((await served.http.get("/v1/models/x")).json()["error"]) == {"message", "type", "param", "code"}
