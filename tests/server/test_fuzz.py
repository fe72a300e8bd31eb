"""No client value gives a 500: requests that follow the OpenAPI document, break it, or have extreme values anywhere.

Every answer must be what the document says of it. A small sample runs with the other tests, `make test-fuzz` sends ten
thousand requests.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from pilotfish.server.protocol.foreign import FOREIGN
from tests.support.running_server import MODEL, RunningServer
from tests.support.scripted_app import ScriptedApp

pytestmark = pytest.mark.process

DOCUMENT: dict[str, Any] = ScriptedApp(lambda request: []).app.openapi()
POSTS = [path for path, methods in DOCUMENT["paths"].items() if "requestBody" in methods.get("post", {})]
GETS = [path for path, methods in DOCUMENT["paths"].items() if "get" in methods]
FEW = 3
"""Answers to a prompt, and prompts: more of them only take longer."""

BASE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "a"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"model": MODEL, "input": "a"},
    "/v1/messages": {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
"""A request of each endpoint that is answered, to which extreme values are added. Others begin with no fields."""

NUMBERS = ["0", "-0.0", "1", "-1", "2147483648", "9223372036854775807", "-9223372036854775809", "18446744073709551616"]
NUMBERS += ["1e308", "1e-320", "1e999", "NaN", "-Infinity", "0.1", "9" * 400, "-" + "9" * 4200, "9" * 5000]
STRINGS = ['""', '" "', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"<|im_start|>"', '"é\\u202e🐟"', '"a"', '"none"']
STRINGS += [
    '"auto"',
    '"null"',
    '"text"',
    '"{{ 7 * 7 }}"',
    '"%1000000000d"',
    '"' + "x" * 3000 + '"',
    '"' + "\\\\" * 500 + '"',
]
OTHERS = ["null", "true", "false", "[]", "{}", "[[]]", "[null]", "[{}]", '{"": null}', "[" * 90 + "]" * 90, "[" * 3000]
OTHERS += [
    '{"type": "text"}',
    '{"type": "json_object"}',
    '{"self": 1}',
    '{"include_usage": 1}',
    '{"\\ud800": 1}',
    "{",
    "",
]
EXTREMES = [*NUMBERS, *STRINGS, *OTHERS]


def lists(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(values, min_size=1, max_size=4).map(lambda items: f"[{', '.join(items)}]")


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(
        st.sampled_from([*STRINGS[:9], '"type"', '"role"', '"content"', '"5"', '"text"', '"name"']), values
    )
    return st.lists(members, min_size=1, max_size=4).map(lambda items: f"{{{', '.join(map(': '.join, items))}}}")


VALUES = st.sampled_from(EXTREMES)
VALUES = VALUES | lists(VALUES) | objects(VALUES) | lists(objects(VALUES))
"""JSON, or nearly."""


def fields_of(path: str) -> list[str]:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])


@st.composite
def extreme(draw: st.DrawFn) -> tuple[str, bytes]:
    """A request with a few extreme values, among fields that it needs."""
    path = draw(st.sampled_from(POSTS))
    names = st.sampled_from(fields_of(path)) | st.sampled_from(sorted(FOREIGN)) | st.just("frobnicate")
    chosen = draw(st.dictionaries(names, VALUES, min_size=1, max_size=draw(st.sampled_from([1, 1, 4]))))
    body = {name: json.dumps(value) for name, value in BASE.get(path, {}).items()} | chosen
    for name in ("n", "best_of"):
        if body.get(name) not in (None, *NUMBERS[:4], *STRINGS, *OTHERS):
            body[name] = draw(st.sampled_from(["1", "3", "129", "null"]))
    return path, f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in body.items())}}}".encode()


def documented() -> st.SearchStrategy[tuple[str, bytes]]:
    """Requests as the document has them, and such that break it; most of them for the model that is served."""
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    ways = []
    for path in POSTS:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = schema[path]["POST"].as_strategy(generation_mode=mode)
            ways.append(st.tuples(st.just(path), cases, st.integers(0, 9)).map(_encoded))
    return st.one_of(ways)


def _encoded(request: tuple[str, Any, int]) -> tuple[str, bytes]:
    path, case, kind = request
    body = case.body
    if isinstance(body, bytes):
        return path, body
    if isinstance(body, dict):
        if kind and isinstance(body.get("model"), str):
            body = body | {"model": MODEL}
        for name in ("n", "best_of"):
            if type(body.get(name)) is int and body[name] > FEW and body[name] <= 128:
                body = body | {name: FEW}
        if isinstance(body.get("prompt"), list) and kind > 2:
            body = body | {"prompt": body["prompt"][:FEW]}
    return path, json.dumps(body, default=str).encode()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Its context is short, and so are its answers."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--kv-cache-memory", "8MiB", "--max-num-seqs", "16", "--max-model-len", "48", "--log-level", "warning"]
    running = RunningServer(log, "--model", str(tiny_llama), *flags)
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def conforms() -> Callable[[str, str, httpx.Response], None]:
    """Checks that a response is one that the document has."""
    validators: dict[tuple[str, str], Any] = {}

    def check(method: str, path: str, response: httpx.Response) -> None:
        responses = DOCUMENT["paths"][path][method]["responses"]
        known = "200" if response.status_code == 200 else "default"
        assert known in responses, response.status_code
        kind = response.headers["content-type"].partition(";")[0]
        assert kind in responses[known]["content"], kind
        if kind != "application/json":
            return
        if (path, known) not in validators:
            schema = responses[known]["content"][kind]["schema"] | {"components": DOCUMENT["components"]}
            validators[path, known] = jsonschema_rs.validator_for(schema)
        validators[path, known].validate(response.json())

    return check


Send = Callable[[str, bytes], int]


@pytest.fixture(scope="module")
def send(server: RunningServer, conforms: Callable[[str, str, httpx.Response], None]) -> Send:
    """Sends a request, checks the response, and returns its status."""

    def one(path: str, body: bytes) -> int:
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        known = (200, 400, 403, 404) if path.endswith("lora_adapter") else (200, 400, 404)
        assert response.status_code in known, (response.status_code, path, body[:300], response.text[:300])
        if response.status_code == 400:
            assert len(response.json()["error"]["message"]) <= 1000
        assert '"internal_error"' not in response.text
        assert '"engine_error"' not in response.text
        conforms("post", path, response)
        return response.status_code

    return one


def still_serves(server: RunningServer, answer: Any = None) -> Any:
    """Return a known request's answer, once nothing else is running."""
    known = {"model": MODEL, "prompt": "The sea", "temperature": 0, "max_tokens": 8}
    found = server.http.post("/v1/completions", json=known).json()["choices"]
    assert answer in (None, found)
    assert server.metric("pilotfish_sequences_running") == server.metric("pilotfish_sequences_waiting") == 0
    return found


@pytest.mark.parametrize("count", [150, pytest.param(6_000, marks=[pytest.mark.fuzz, pytest.mark.slow])])
def test_any_request_is_answered_or_refused(server: RunningServer, send: Send, count: int) -> None:
    statuses: Counter[int] = Counter()
    answer = still_serves(server)

    @settings(
        max_examples=count, database=None, derandomize=count < 1000, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(extreme() | documented())
    def ask(request: tuple[str, bytes]) -> None:
        statuses[send(*request)] += 1

    ask()
    print(f"answers by status: {statuses}")
    assert statuses[200] > count / 50
    assert statuses[400] > count / 10
    still_serves(server, answer)


@pytest.mark.fuzz
@pytest.mark.slow
def test_every_field_with_every_extreme(server: RunningServer, send: Send) -> None:
    statuses: Counter[int] = Counter()
    answer = still_serves(server)
    for path in POSTS:
        for name in (*fields_of(path), "frobnicate"):
            for value in (*EXTREMES, *(f"[{each}]" for each in EXTREMES[:20])):
                body = {key: json.dumps(own) for key, own in BASE.get(path, {}).items()} | {name: value}
                members = ", ".join(f"{json.dumps(key)}: {own}" for key, own in body.items())
                statuses[send(path, f"{{{members}}}".encode())] += 1
    print(f"answers by status: {statuses}")
    assert statuses.total() > 4_000
    still_serves(server, answer)


def test_what_is_read_is_as_documented(server: RunningServer, conforms: Any) -> None:
    for path in GETS:
        conforms("get", path, server.http.get(re.sub(r"\{.*?\}", MODEL, path)))
    for name in ("../../etc", "%00", "é" * 50, "a/b", "%F0%9F"):
        response = server.http.get(f"/v1/models/{name}")
        assert response.status_code == 404
        conforms("get", "/v1/models/{model}", response)
