"""Tenants: who is one, that they share no prefixes, and that no key is logged."""

from __future__ import annotations

import json
import logging
import signal
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
from pilotfish.server.errors import ApiError
from pilotfish.server.keys import KeyRing
from pilotfish.server.quotas import Quotas
from pilotfish.server.tenants import ApiKey, KeyLimits, parse_key, prefix_salt
from tests.support.running_server import RunningServer
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


# Keys from a file, and their limits.


def ring(tmp_path: Path, text: str, *given: str) -> KeyRing:
    (tmp_path / "keys").write_text(text)
    return KeyRing(given, str(tmp_path / "keys"))


def test_a_file_has_keys_names_and_limits(tmp_path: Path) -> None:
    found = ring(
        tmp_path,
        "# ours\n\nplain\n  alice=k1 weight=2.5 max_sequences=4 \nalice=k2 weight=2.5 max_sequences=4\n",
        "bob=k3",
    )
    alice = KeyLimits(weight=2.5, max_sequences=4)
    assert found.keys == (
        ApiKey("k3", "bob"), ApiKey("plain"), ApiKey("k1", "alice", alice), ApiKey("k2", "alice", alice),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        ("# none\n", "has no keys"),
        ("a=k1 weight=0", "line 1: Expected `float` > 0"),
        ("a=k1\nb=k2 speed=2", "line 2 has 'speed' after a key, but may have each of weight, max_sequences"),
        ("a=k1 weight=1 weight=2", "each of"),
        ("a=k1 max_sequences=many", "line 1: Expected `int`"),
        ("k1 weight=2", "limits for a key without a name"),
        ("a=sesame\nb=sesame", "has a key twice, of 'a' and of 'b'"),
        ("a=k1 weight=2\na=k2", "different limits for two keys of 'a'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_without_showing_a_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ring(tmp_path, text)
    assert said in str(refused.value)
    assert not any(key in str(refused.value) for key in ("k1", "k2", "sesame"))


async def test_a_file_is_read_again_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("alice=old\n")
    served = ScriptedApp(lambda request: say(request, [5]), ServerConfig(api_key_file=str(tmp_path / "keys")))

    async def statuses() -> list[int]:
        answers = [await served.http.get("/v1/models", headers=bearer(key)) for key in ("old", "new", "old ")]
        return [answer.status_code for answer in answers]

    assert await statuses() == [200, 401, 200]
    (tmp_path / "keys").write_text("alice=new weight=3\n")
    served.app.state.keys.reload()
    assert await statuses() == [401, 200, 401]
    for wrong in ("", "alice=newer speed=1"):
        (tmp_path / "keys").write_text(wrong)
        served.app.state.keys.reload()
    (tmp_path / "keys").unlink()
    served.app.state.keys.reload()
    assert await statuses() == [401, 200, 401]
    assert caplog.text.count("the API keys stay as they are") == 3
    assert "1 API keys were read again: 1 are new, 1 have gone" in caplog.text
    response = await served.http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}, headers=bearer("new"))
    assert response.status_code == 200
    assert (served.engine.requests[-1].tenant, served.engine.requests[-1].weight) == ("alice", 3.0)


def test_limits_are_a_tenants_and_run_in_again() -> None:
    now = 0.0
    quotas = Quotas(clock=lambda: now)
    one, two = (ApiKey(key, "a", KeyLimits(requests_per_minute=2)) for key in "12")
    for key in (one, two):
        with quotas.admit(key, 1):
            pass
    with pytest.raises(ApiError, match="requests_per_minute") as refused, quotas.admit(one, 1):
        pass
    assert (refused.value.status, refused.value.retry_after) == (429, pytest.approx(30.0))
    with quotas.admit(ApiKey("3", "b", KeyLimits(requests_per_minute=2)), 1), quotas.admit(None, 1):
        pass
    now = 30.0
    with quotas.admit(two, 1):
        pass
    with pytest.raises(ApiError), quotas.admit(two, 1):
        pass
    now = 10_000.0  # no more than a minute's has run in
    for _ in range(2):
        with quotas.admit(one, 1):
            pass
    with pytest.raises(ApiError), quotas.admit(one, 1):
        pass


def test_tokens_that_were_not_used_are_given_back() -> None:
    now = 0.0
    quotas = Quotas(clock=lambda: now)
    key = ApiKey("1", "a", KeyLimits(tokens_per_minute=600))
    with quotas.admit(key, 1) as quota:
        quota.claim(1000)
        with pytest.raises(ApiError, match="tokens_per_minute") as refused, quotas.admit(key, 1):
            pass
        assert refused.value.retry_after == pytest.approx(40.1)
        quota.used = 100
    with quotas.admit(key, 1) as quota:
        quota.claim(500)
        quota.used = 500
    with pytest.raises(ApiError), quotas.admit(key, 1):
        pass
    now = 0.2
    with quotas.admit(key, 1):
        pass


def test_sequences_in_flight_are_limited_but_for_one_request_alone() -> None:
    quotas = Quotas()
    key = ApiKey("1", "a", KeyLimits(max_sequences=3))
    with quotas.admit(key, 2), quotas.admit(key, 1):
        with pytest.raises(ApiError, match="max_sequences"), quotas.admit(key, 1):
            pass
        with quotas.admit(ApiKey("2", "b", KeyLimits(max_sequences=3)), 3):
            pass
    with quotas.admit(key, 3):
        pass


async def test_tenants_are_counted_by_name_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.server.metrics.MAX_TENANTS", 2)
    (tmp_path / "keys").write_text("a=k1\nb=k2\nc=k3 requests_per_minute=1\nk4\n")
    served = ScriptedApp(lambda request: say(request, [5], [6]), ServerConfig(api_key_file=str(tmp_path / "keys")))
    answers = [await served.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a b", "n": 2}, headers=bearer(key)
    ) for key in ("k1", "k2", "k2", "k3", "k3", "k4")]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429, 200]
    assert answers[4].json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answers[4].headers["retry-after"]) > 50
    metric = served.metric
    assert [
        metric("pilotfish_tenant_requests_total", tenant=name, outcome="served") for name in ("a", "b", "c", "other")
    ] == [1, 2, 0, 1]
    assert metric("pilotfish_tenant_requests_total", tenant="other", outcome="limited") == 1
    assert metric("pilotfish_tenant_tokens_total", tenant="b", kind="generated") == 8
    assert metric("pilotfish_tenant_tokens_total", tenant="b", kind="prompt") == 8
    assert "k1" not in served.metrics.render().decode().replace("k1=", "")


@pytest.mark.process
def test_sighup_reads_the_keys_again(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice=old\n")
    flags = ("--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--api-key-file", str(tmp_path / "keys"))
    running = RunningServer(tmp_path / "log", *flags, own_group=True)
    try:
        running.wait_for("/ready", 200)
        engine = running.engine
        (tmp_path / "keys").write_text("alice=new\n")
        running.signal_group(signal.SIGHUP)
        running.wait_until(lambda: running.http.get("/v1/models", headers=bearer("new")).status_code == 200, 20)
        assert running.http.get("/v1/models", headers=bearer("old")).status_code == 401
        assert running.engine == engine
        said = running.log.read_text()
        assert "1 API keys were read again" in said
        assert "alice=" not in said
    finally:
        running.stop()
