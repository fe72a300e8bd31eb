"""Requests from bug reports against servers of this kind, as data in api_cases.json, sent to a real server."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilotfish.checkpoints.catalog import ModelFiles
from tests.support.running_server import RunningServer

pytestmark = [pytest.mark.process, pytest.mark.real_model]

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "api_cases.json").read_text())
UNDERSTOOD = {
    "name", "source", "method", "path", "headers", "body", "raw", "raw_base64", "raw_body", "repeat_content",
    "send_delay_between_head_and_body_s", "missing", "expect",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = RunningServer(log, "--model", "smollm2-135m", "--kv-cache-memory", "256MiB")
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


def marked(case: dict[str, Any]) -> Any:
    """A case that is not handled yet says so: it has to fail until its entry is removed."""
    marks = [pytest.mark.xfail(strict=True, reason=case["missing"])] if "missing" in case else []
    return pytest.param(case, id=case["name"], marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_case(server: RunningServer, case: dict[str, Any]) -> None:
    assert case.keys() <= UNDERSTOOD
    if "raw" in case:
        responses = exchange(server, case["raw"].encode(), case.get("send_delay_between_head_and_body_s", 0.0))
        assert responses.count(b"HTTP/1.1 ") == case["expect"].get("responses", 1)
        assert int(responses.split(b" ", 2)[1]) == case["expect"]["status"]
        return
    seconds = 0.0
    if "health_seconds" in case["expect"]:
        with Watched(server) as watched:
            response = send(server, case)
        seconds = watched.longest
    else:
        response = send(server, case)
    check(response, case["expect"], seconds)


def send(server: RunningServer, case: dict[str, Any]) -> httpx.Response:
    headers = {"content-type": "application/json"} | case.get("headers", {})
    if "raw_base64" in case:
        content = base64.b64decode(case["raw_base64"])
    elif "raw_body" in case:
        content = case["raw_body"].encode()
    elif "body" in case:
        body = case["body"]
        for message in body.get("messages") or []:
            message["content"] = message.get("content") and message["content"] * case.get("repeat_content", 1)
        content = json.dumps(body).encode()
    else:
        content = b""
    return server.http.request(case["method"], case["path"], content=content, headers=headers)


def check(response: httpx.Response, expect: dict[str, Any], health_seconds: float) -> None:
    expected = expect["status"] if isinstance(expect["status"], list) else [expect["status"]]
    assert response.status_code in expected, response.text[:500]
    assert health_seconds <= expect.get("health_seconds", 0.0)
    if "header" in expect:
        assert expect["header"] in response.headers
    is_json = response.headers.get("content-type", "") == "application/json"
    read = response.json() if is_json and response.content else {}
    error = read.get("error", {})
    for name in ("code", "param"):
        if name in expect:
            assert error[name] == expect[name]
    assert expect.get("message", "") in error.get("message", "")
    if "text_offset" in expect:
        assert read["choices"][0]["logprobs"]["text_offset"] == expect["text_offset"]
    if "finish_reason" in expect:
        assert read["choices"][0]["finish_reason"] == expect["finish_reason"]
    if "completion_tokens" in expect:
        assert read["usage"]["completion_tokens"] == expect["completion_tokens"]
    if "count_of_id_1" in expect:
        assert read["tokens"].count(1) == expect["count_of_id_1"]


def exchange(server: RunningServer, request: bytes, delay: float) -> bytes:
    """Send a request as it is, its body a little later, and return all that comes back within a while."""
    url = httpx.URL(server.url)
    head, _, body = request.partition(b"\r\n\r\n")
    with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
        connection.sendall(head + b"\r\n\r\n")
        time.sleep(delay)
        connection.sendall(body)
        received = connection.recv(1 << 16)
        connection.settimeout(0.5)
        try:
            while more := connection.recv(1 << 16):
                received += more
        except TimeoutError:
            pass
    return received


class Watched:
    """Asks /health again and again meanwhile; `longest` is how long an answer took at most, in seconds."""

    def __init__(self, server: RunningServer) -> None:
        self.longest = 0.0
        self._url = server.url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as http:
            while not self._done.is_set():
                began = time.monotonic()
                assert http.get("/health").status_code == 200
                self.longest = max(self.longest, time.monotonic() - began)
