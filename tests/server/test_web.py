"""What HTTP clients expect beside the API: CORS, HEAD, compressed bodies."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from pilotfish.errors import ConfigError
from pilotfish.server.compression import Decompress
from pilotfish.server.config import ServerConfig
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}
BODY = json.dumps({"model": "tiny", "prompt": "a"}).encode()
GETS = ["/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/tiny", "/openapi.json"]


def served(**config: Any) -> ScriptedApp:
    return ScriptedApp(lambda request: say(request, [5]), ServerConfig(**config))


async def post(app: ScriptedApp, content: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await app.http.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize("keys", [(), ("secret",)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/anything", "/tokenize"])
async def test_a_page_of_another_origin_may_ask_without_a_key(path: str, keys: tuple[str, ...]) -> None:
    response = await served(api_key=keys).http.options(path, headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert {"authorization", "content-type"} <= {
        name.strip() for name in response.headers["access-control-allow-headers"].lower().split(",")
    }
    assert "access-control-allow-credentials" not in response.headers


async def test_answers_and_errors_carry_the_header(caplog: pytest.LogCaptureFixture) -> None:
    failing = ScriptedApp(lambda request: [ZeroDivisionError()])
    for app, path, status in (
        (served(), "/v1/models", 200), (served(api_key=("secret",)), "/v1/models", 401), (served(), "/v1/nothing", 404),
    ):  # fmt: skip
        response = await app.http.get(path, headers={"origin": ORIGIN})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    response = await post(failing, BODY, origin=ORIGIN)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (500, "*")


async def test_origins_can_be_chosen() -> None:
    app = served(cors_origins=(ORIGIN, "https://chat.example.com"))
    known = await app.http.get("/v1/models", headers={"origin": ORIGIN})
    assert known.headers["access-control-allow-origin"] == ORIGIN
    assert "origin" in known.headers["vary"].lower()
    other = await app.http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    for config in ({"cors_origins": ("none",)}, {}):
        path = "/v1/models" if config else "/somewhere"  # nothing but the API is shared
        response = await served(**config).http.get(path, headers={"origin": ORIGIN})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origins", [("localhost",), ("http://a/path",), ("*", ORIGIN), ("",)])
def test_an_origin_that_is_none_is_refused(origins: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="cors_origins has"):
        ServerConfig(cors_origins=origins).check()


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_the_body(path: str) -> None:
    app = served()
    head, get = await app.http.head(path), await app.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"] or path == "/metrics"
    assert (await app.http.head("/v1/completions")).status_code == 405


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
async def test_a_compressed_body_is_read(encoding: str) -> None:
    content = zlib.compress(BODY) if encoding == "deflate" else gzip.compress(BODY)
    response = await post(served(), content, content_encoding=encoding)
    assert response.status_code == 200, response.text


async def test_a_compressed_body_may_arrive_in_parts() -> None:
    content = gzip.compress(BODY)

    async def parts() -> Any:
        for i in range(len(content)):
            yield content[i : i + 1]

    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = await served().http.post("/v1/completions", content=parts(), headers=headers)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
async def test_another_encoding_is_415_and_named(encoding: str) -> None:
    response = await post(served(), BODY, content_encoding=encoding)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (415, "unsupported_encoding")
    assert encoding in error["message"]
    assert "gzip" in error["message"]


async def test_others_have_their_turn_while_a_small_body_becomes_a_large_one() -> None:
    plain = bytes(range(256)) * (16 << 12)
    parts, turns, received = [gzip.compress(plain)], 0, []

    async def receive() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            asyncio.get_running_loop().call_soon(another)
            message = await receive()
            received.append(message["body"])
            if not message["more_body"]:
                return

    def another() -> None:
        nonlocal turns
        turns += 1

    scope = {"type": "http", "headers": [(b"content-encoding", b"gzip")]}
    await Decompress(application, len(plain))(scope, receive, None)  # type: ignore[arg-type]
    assert b"".join(received) == plain
    assert max(map(len, received)) <= 1 << 18
    assert turns >= len(received) - 1


async def test_a_small_body_that_becomes_a_large_one_is_refused() -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    response = await post(served(max_body_bytes=1 << 20), bomb, content_encoding="gzip")
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    exact = await post(served(max_body_bytes=len(BODY) + 60), gzip.compress(BODY + b" " * 60), content_encoding="gzip")
    assert exact.status_code == 200, exact.text


@pytest.mark.parametrize(
    "content",
    [BODY, gzip.compress(BODY)[:-1], gzip.compress(BODY) + b"x", b""],
    ids=["plain", "cut short", "with more behind it", "empty"],  # gzip writes the time: contents differ by process
)
async def test_a_body_that_is_not_compressed_as_it_says_is_400(content: bytes) -> None:
    response = await post(served(), content, content_encoding="gzip")
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/v1//completions//"])
async def test_slashes_too_many_are_taken_out(path: str) -> None:
    app = served(api_key=("secret",))
    url = f"http://test{path}"
    headers = {"content-type": "application/json", "origin": ORIGIN}
    refused = await app.http.post(url, content=BODY, headers=headers)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")
    response = await app.http.post(url, content=BODY, headers=headers | {"x-api-key": "secret"})
    assert response.status_code == 200
    assert app.metric("pilotfish_http_requests_total", route="/v1/completions", status="200") == 1


async def test_other_paths_are_taken_as_they_are() -> None:
    """A proxy may keep clients from /metrics by its name."""
    for path in ("//metrics", "/metrics/", "/v1//nothing"):
        assert (await served().http.get(f"http://test{path}")).status_code in (307, 404)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/api/v1/models", "/v1/models"),
        ("/v1/engines/davinci/completions", "/v1/completions"),
        ("/v2/nothing", None),
        ("/", None),
    ],
)
async def test_an_unknown_path_gets_the_one_that_was_probably_meant(path: str, hint: str | None) -> None:
    response = await served().http.post(path, json={})
    message = response.json()["error"]["message"]
    assert response.status_code == 404
    assert message.endswith(f"did you mean {hint}?" if hint else "/docs for the endpoints that exist.")
