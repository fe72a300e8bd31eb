"""Every error below /v1/messages has Anthropic's form, wherever it is raised."""

from __future__ import annotations

import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic.types import ErrorResponse

from pilotfish.engine.request import Request
from pilotfish.errors import EngineDeadError
from pilotfish.server.admission import Limits
from pilotfish.server.config import ServerConfig
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, Script, say

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}


def served(script: Script = lambda request: say(request, [5]), **config: Any) -> ScriptedApp:
    return ScriptedApp(script, ServerConfig(**config))


def check(response: httpx.Response, status: int, kind: str) -> str:
    """Checks an error, and returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    if status != 413:  # documented, but not in the client's types
        ErrorResponse.model_validate(body)
    message: str = body["error"]["message"]
    assert message
    return message


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("fields", "status", "part"),
    [
        ({"model": "gpt-4"}, 404, "'tiny'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": []}, 400, "messages"),
        ({"stop_sequence": ["a"]}, 400, "stop_sequences"),
        ({"tool_choise": "auto"}, 400, "Did you mean tool_choice?"),
        ({"mcp_servers": [{}]}, 400, "mcp_servers"),
        ({"stop": "a"}, 400, "stop_sequences"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_wrong_requests(path: str, fields: dict[str, Any], status: int, part: str) -> None:
    content = json.dumps(ASKED | fields).encode()
    response = await served().http.post(path, content=content, headers={"content-type": "application/json"})
    assert part in check(response, status, "not_found_error" if status == 404 else "invalid_request_error")


async def test_a_prompt_that_is_too_long() -> None:
    messages = [{"role": "user", "content": "a " * 100}]
    response = await served().http.post(PATH, json=ASKED | {"messages": messages})
    message = check(response, 400, "invalid_request_error")
    assert message == f"prompt is too long: 100 tokens > {INFO.max_model_len - 1} maximum"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None}, {"max_tokens": -1}, {"max_tokens": "4"}, {"temperature": 3}, {"top_p": 2}, {"top_k": -3},
        {"stop_sequences": [""]}, {"stop_sequences": 3}, {"stream": "yes"}, {"speculation": "clairvoyance"},
        {"seed": "a"},
    ],
    ids=str,
)  # fmt: skip
async def test_wrong_values_are_named(fields: dict[str, Any]) -> None:
    message = check(await served().http.post(PATH, json=ASKED | fields), 400, "invalid_request_error")
    assert next(iter(fields)) in message


@pytest.mark.parametrize("path", [PATH, COUNT, f"{PATH}?beta=true"])
async def test_errors_before_the_route(path: str) -> None:
    app = served(api_key=("secret",), max_body_bytes=200)
    key = {"x-api-key": "secret", "content-type": "application/json"}
    check(await app.http.post(path, json=ASKED), 401, "authentication_error")
    check(await app.http.post(path, json=ASKED, headers={"x-api-key": "wrong"}), 401, "authentication_error")
    check(await app.http.post(path, content=b"{", headers=key), 400, "invalid_request_error")
    check(await app.http.post(path, content=b"\xff", headers=key), 400, "invalid_request_error")
    check(await app.http.post(path, content=b"", headers=key), 400, "invalid_request_error")
    check(await app.http.post(path, content=b"[]", headers=key), 400, "invalid_request_error")
    check(await app.http.post(path, content=b" " * 300, headers=key), 413, "request_too_large")
    check(await app.http.get(path, headers=key), 405, "invalid_request_error")
    packed = key | {"content-encoding": "gzip"}
    check(await app.http.post(path, content=gzip.compress(b" " * 300), headers=packed), 413, "request_too_large")
    check(await app.http.post(path, content=b"no", headers=packed), 400, "invalid_request_error")
    brotli = key | {"content-encoding": "br"}
    check(await app.http.post(path, content=b"no", headers=brotli), 415, "invalid_request_error")


async def test_paths_that_do_not_exist() -> None:
    app = served()
    check(await app.http.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    openais = (await app.http.post("/v1/messagess", json={})).json()
    assert set(openais["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("state", "kind", "retry"), [("starting", "overloaded_error", True), ("dead", "api_error", False)]
)
async def test_an_engine_that_is_loading_or_dead(state: str, kind: str, retry: bool) -> None:
    app = served()
    app.engine.state = state
    for path in (PATH, COUNT):
        response = await app.http.post(path, json=ASKED)
        check(response, 503, kind)
        assert ("retry-after" in response.headers) == retry


async def test_a_full_queue() -> None:
    app = served(max_queue=0)
    with app.app.state.service.gate.admit(2, Limits(2)):
        response = await app.http.post(PATH, json=ASKED)
    check(response, 429, "rate_limit_error")
    assert int(response.headers["retry-after-ms"]) > 0


async def test_a_defect_of_the_server() -> None:
    message = check(
        await served(lambda request: [ZeroDivisionError("secret")]).http.post(PATH, json=ASKED), 500, "api_error"
    )
    assert "secret" not in message


def client_of(app: ScriptedApp) -> anthropic.AsyncAnthropic:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app.app))
    return anthropic.AsyncAnthropic(base_url="http://test", api_key="none", max_retries=0, http_client=http)


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda client: client.messages.create(**ASKED | {"model": "x"}), anthropic.NotFoundError),
        (lambda client: client.messages.create(**ASKED | {"messages": []}), anthropic.BadRequestError),
        (lambda client: client.models.retrieve("x"), anthropic.NotFoundError),
    ],
)
async def test_anthropics_client_knows_them(
    ask: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]], kind: type[anthropic.APIStatusError]
) -> None:
    async with client_of(served()) as client:
        with pytest.raises(kind) as caught:
            await ask(client)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"
    assert caught.value.request_id == caught.value.body["request_id"]


async def test_an_error_in_a_stream_is_an_event() -> None:
    def dying(request: Request) -> list[Any]:
        return [*say(request, [5], [6])[:1], EngineDeadError("by a test")]

    app = served(dying)
    response = await app.http.post(PATH, json=ASKED | {"stream": True})
    name, data = response.text.strip().split("\n\n")[-1].split("\n")
    body = json.loads(data.removeprefix("data: "))
    assert (name, body["error"]["type"]) == ("event: error", "api_error")
    assert body["request_id"] == response.headers["request-id"]
    ErrorResponse.model_validate(body)
    async with client_of(app) as client:
        with pytest.raises(anthropic.APIStatusError, match="The engine has ended"):
            async with client.messages.stream(**ASKED) as stream:
                await stream.until_done()
