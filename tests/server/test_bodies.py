"""Large bodies: refused where they hold too much, validated like small ones, and freed; long texts that cannot fit are
refused before they are tokenized, and those of clients that have left are not tokenized."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import resolve
from pilotfish.server import bodies
from pilotfish.server.bodies import LARGE_BODY, parse, too_many
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import ApiError
from pilotfish.server.generation.facts import facts_of
from pilotfish.server.offload import LONG_TEXT, Tokenizing
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.scripted_app import ScriptedApp, WordTokenizer
from tests.support.scripted_engine import say

PAD = {"metadata": {"pad": "x" * LARGE_BODY}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def app(tokenizer: Any = None, **config: Any) -> ScriptedApp:
    return ScriptedApp(lambda request: say(request, [5]), ServerConfig(**config), tokenizer)


@pytest.fixture(scope="module")
def real(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(resolve(str(tiny_llama)))


@given(value=JSON)
def test_bodies_are_parsed_as_json_parses_them(value: Any) -> None:
    raw = json.dumps(value).encode()
    assert repr(parse(raw)) == repr(json.loads(raw))


@given(value=JSON)
def test_values_in_strings_are_not_counted(value: Any) -> None:
    within = json.dumps({"text": json.dumps(value) * 20, "more": ['"[', "\\", '\\"{,']}).encode()
    with pytest.MonkeyPatch.context() as patch:
        for name, most in (("MAX_CONTAINERS", 2), ("MAX_STRINGS", 6), ("MAX_VALUES", 3)):
            patch.setattr(bodies, name, most)
        assert too_many(within) is None
        for name in ("MAX_CONTAINERS", "MAX_STRINGS", "MAX_VALUES"):
            with pytest.MonkeyPatch.context() as lower:
                lower.setattr(bodies, name, 1)
                assert too_many(within) is not None


@pytest.mark.parametrize(
    "value", [b"[" + b"[]," * 10**5 + b"1]", b'{"a":[' + b'"",' * 300_000 + b"1]}", b"[" + b"1," * 3_000_000 + b"1]"]
)
def test_a_body_of_too_many_values_is_refused(value: bytes) -> None:
    with pytest.raises(ApiError, match="has more than"):
        parse(value)


@pytest.mark.parametrize(
    "wrong", [
        {"prompt": 5}, {"messages": "a"}, {"temprature": 1}, {"temperature": "hot"}, {"stop": [1]}, {"model": None},
        {"prompt": ["a", "b"]}, {"unknown": 1},
    ]
)  # fmt: skip
async def test_a_large_body_is_answered_as_a_small_one(wrong: dict[str, Any]) -> None:
    served = app()
    small, large = await served.complete(**wrong), await served.complete(**wrong, **PAD)
    assert small.status_code == large.status_code
    same = ("error",) if small.status_code == 400 else ("choices", "usage")
    assert [small.json()[name] for name in same] == [large.json()[name] for name in same]
    assert small.headers.get("warning") == large.headers.get("warning")


@pytest.mark.parametrize("body", [b"[" * 60_000 + b" " * 40_000, b"x" * 10**5, b"\xff" * 10**5, b" " * 10**5])
async def test_a_large_body_that_is_no_request_is_answered_as_a_small_one(body: bytes) -> None:
    served = app()
    headers = {"content-type": "application/json"}
    large, small = [await served.http.post("/v1/completions", content=b, headers=headers) for b in (body, body[:100])]
    assert large.status_code == small.status_code == 400
    assert large.json()["error"]["code"] == small.json()["error"]["code"]


async def test_bodies_in_flight_are_bounded_together() -> None:
    """Their bytes are free again once they are answered."""
    held = asyncio.Event()
    served = app(max_bodies_bytes=300_000, max_body_bytes=200_000)
    prompt = {"prompt": "a b", "metadata": {"pad": "x" * 150_000}}
    engine, generate = served.engine, served.engine.generate

    async def waiting(request: Any) -> Any:
        await held.wait()
        async for delta in generate(request):
            yield delta

    engine.generate = waiting  # type: ignore[method-assign]
    first = asyncio.create_task(served.complete(**prompt))
    await asyncio.sleep(0.2)

    async def unsized() -> Any:
        yield json.dumps({"model": "tiny", **prompt}).encode()

    for refused in (
        await served.complete(**prompt),
        await served.http.post("/v1/completions", content=unsized(), headers={"content-type": "application/json"}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "bodies_full")
        assert float(refused.headers["retry-after"]) > 0
    held.set()
    assert (await first).status_code == 200
    assert (await served.complete(**prompt)).status_code == 200


async def test_a_text_that_cannot_fit_is_not_tokenized(real: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    served = app(real)
    long = [0]
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, *arguments: Any) -> list[int]:
        long[0] += len(text) > LONG_TEXT
        return encode(self, text, *arguments)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    text = "The shark " * 10_000
    for response in (
        await served.complete(prompt=text),
        await served.complete(prompt=["short", text]),
        await served.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": text}]}
        ),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "resulted in at least" in error["message"]
    assert long == [0]
    assert (await served.http.post("/tokenize", json={"prompt": text})).json()["count"] > 10_000
    assert long == [1]


class Slow(WordTokenizer):
    """Holds each long text until it is let go."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.texts: list[str] = []

    @property
    def length_bound(self) -> Any:
        class Nothing:
            at_least: Callable[..., int] = staticmethod(lambda text, enough: 0)

        return Nothing

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) >= LONG_TEXT:
            self.texts.append(text[:1])
            self.going.wait(10)
        return [1]


async def test_texts_of_clients_that_have_left_are_not_tokenized() -> None:
    slow = Slow()
    tokenizing = Tokenizing(slow, threads=1)  # type: ignore[arg-type]
    tasks = [asyncio.create_task(tokenizing.encode(letter * LONG_TEXT, True)) for letter in "abc"]
    await asyncio.sleep(0.1)
    tasks[1].cancel()
    await asyncio.sleep(0)
    assert await tokenizing.encode("short", True) == [1]  # at once, in the middle of all this
    slow.going.set()
    assert await tasks[2] == [1]
    assert slow.texts == ["a", "c"]


async def test_a_client_that_leaves_is_noticed_before_its_text_is_tokenized() -> None:
    slow = Slow()
    served = app(slow)
    busy = [asyncio.create_task(served.complete(prompt="a" * LARGE_BODY)) for _ in range(2)]
    await asyncio.sleep(0.2)
    body = json.dumps({"model": "tiny", "prompt": "b" * LARGE_BODY}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": None, "server": None, "scheme": "http",
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    slow.going.clear()
    await asyncio.wait_for(served.app(scope, receive, send), 5)
    assert sent[0]["status"] == 499
    assert facts_of(scope).body_bytes == len(body)
    slow.going.set()
    assert {response.status_code for response in await asyncio.gather(*busy)} == {200}
    assert slow.texts == ["a", "a"]


async def test_long_ids_become_text_and_are_checked(real: Tokenizer) -> None:
    served = app(real)
    ids = real.encode("The shark swims. " * 3000)
    body = {"tokens": ids}
    response: httpx.Response = await served.http.post("/detokenize", json=body)
    assert response.json()["prompt"] == real.decode(ids, skip_special_tokens=False)
    refused = await served.http.post("/detokenize", json={"tokens": [*ids, 10**9]})
    assert refused.json()["error"]["param"] == "tokens"
    wrong = await served.http.post("/detokenize", json={"tokens": [*ids, "a", "b"]})
    assert wrong.json()["error"]["param"] == f"tokens[{len(ids)}]"


DEEP = {
    "/v1/chat/completions": (
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]',
        '"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": %s}}',
        '"chat_template_kwargs": {"a": %s}',
        '"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": %s}}]}]',
    ),
    "/v1/messages": (
        '"tools": [{"name": "f", "input_schema": %s}]',
        '"output_format": {"type": "json_schema", "schema": %s}',
        '"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": %s}]}]',
        '"metadata": %s',
    ),
}


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, fields in DEEP.items() for field in fields])
async def test_deeply_nested_values_are_no_500(real: Tokenizer, path: str, field: str) -> None:
    """Python's own limit is met at another depth in each place that recurses over them."""
    served = app(real)
    for depth in (100, 300, 500, 700, 900, 940, 5000):
        nested = '{"a": ' * depth + "1" + "}" * depth
        rest = "" if "messages" in field else '"messages": [{"role": "user", "content": "a"}], '
        content = f'{{"model": "tiny", "max_tokens": 2, {rest}{field % nested}}}'
        response = await served.http.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
