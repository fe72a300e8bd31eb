"""Tenants: who is one, that they share no prefixes, and that no key is logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.core import EngineCore
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.errors import ConfigError
from pilotfish.logs import JsonFormatter
from pilotfish.server.config import ServerConfig
from pilotfish.server.tenants import ApiKey, parse_key, prefix_salt
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def salts(
    headers: list[dict[str, str]], bodies: list[dict[str, Any]] | None = None, **config: Any
) -> list[bytes]:
    """Return the salt that each request has in the engine."""
    served = ScriptedApp(lambda request: say(request, [5]), ServerConfig(**config))
    async with served.http:
        for own, body in zip(headers, bodies or [{}] * len(headers), strict=True):
            body = {"model": "tiny", "prompt": "a", **body}
            response = await served.http.post("/v1/completions", json=body, headers=own)
            assert response.status_code == 200, response.text
    return [request.salt for request in served.engine.requests]


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("sk-123", "sk-123", None),
        ("alice=sk-123", "sk-123", "alice"),
        ("team.a_b-1=sk=12=", "sk=12=", "team.a_b-1"),
        ("c2VjcmV0", "c2VjcmV0", None),
        ("c2VjcmV0cw=", "c2VjcmV0cw=", None),  # base64, and its filling
        ("c2VjcmV0cw==", "c2VjcmV0cw==", None),
        ("a/b=c", "a/b=c", None),
        ("=c", "=c", None),
    ],
)
def test_a_key_may_have_a_name(text: str, key: str, name: str | None) -> None:
    assert parse_key(text) == ApiKey(key, name)


async def test_keys_of_one_name_are_one_tenant_and_others_are_apart() -> None:
    headers = [bearer("k1"), bearer("k2"), bearer("k3"), bearer("k4"), {"x-api-key": "k1"}]
    alice, again, bob, nameless, anthropic = await salts(headers, api_key=("alice=k1", "alice=k2", "bob=k3", "k4"))
    assert alice == again == anthropic
    assert len({alice, bob, nameless}) == 3
    assert b"" not in (alice, bob, nameless)


async def test_a_nameless_keys_tenant_does_not_depend_on_the_other_keys() -> None:
    assert await salts([bearer("k1")], api_key=("k1",)) == await salts([bearer("k1")], api_key=("k0", "k1"))


async def test_without_keys_a_header_names_tenants_if_it_is_configured() -> None:
    headers = [{}, {"X-Tenant": "alice"}, {"x-tenant": "alice"}, {"x-tenant": "bob"}, {"x-tenant": " "}]
    none, alice, again, bob, blank = await salts(headers, tenant_header="X-Tenant")
    assert none == blank == b""
    assert alice == again != bob
    assert set(await salts(headers)) == {b""}


async def test_a_keys_name_goes_before_the_header_and_the_header_before_a_nameless_key() -> None:
    keys = ("alice=k1", "k2")
    plain = await salts([bearer("k1"), bearer("k2")], api_key=keys)
    named = await salts(
        [bearer(key) | {"x-tenant": "alice"} for key in ("k1", "k2")], api_key=keys, tenant_header="x-tenant"
    )
    assert named[0] == plain[0]
    assert named[1] not in plain  # not the tenant of alice's key, either


async def test_cache_salt_separates_within_a_tenant() -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"cache_salt": ""},
        {"cache_salt": None},
    ]
    none, a, again, b, empty, null = await salts([{}] * 6, bodies)
    assert none == empty == null == b""
    assert a == again != b
    assert prefix_salt("ab", "c") != prefix_salt("a", "bc")


@pytest.mark.parametrize("values", [["a", "b"], ["a" * 129]])
async def test_a_tenant_header_that_is_not_clear_is_400(values: list[str]) -> None:
    served = ScriptedApp(lambda request: say(request, [5]), ServerConfig(tenant_header="x-tenant"))
    async with served.http:
        response = await served.http.get("/v1/models", headers=[("x-tenant", value) for value in values])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-tenant")


def test_a_tenant_header_is_a_headers_name() -> None:
    with pytest.raises(ConfigError, match="tenant_header is 'two words'"):
        ServerConfig(tenant_header="two words").check()


async def test_the_log_has_the_tenant_and_never_the_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await salts([bearer("sesame-1"), bearer("sesame-2")], api_key=("alice=sesame-1", "sesame-2"))
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not any("sesame" in line for line in lines)
    tenants = [read["tenant"] for read in map(json.loads, lines) if read["logger"] == "server.requests"]
    assert tenants[0] == "alice"
    assert tenants[1].startswith("key:")


def test_a_prefix_is_found_by_requests_of_the_same_salt_alone(tiny_llama: Path) -> None:
    core = EngineCore(EngineConfig(model=str(tiny_llama), kv_cache_memory=4 << 20, num_threads=1))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)

    def cached(salt: bytes) -> int:
        core.add(Request(id="r", prompt_ids=tuple(range(3, 40)), params=params, salt=salt))
        deltas = []
        while core.has_work():
            deltas += core.step().deltas
        return deltas[0].cached_prompt_tokens

    assert [cached(salt) for salt in (b"", b"alice", b"bob", b"", b"alice")] == [0, 0, 0, 32, 32]
    core.close()
