"""smg in front of real servers: how they are registered, where requests go, and what a death, a drain and a new replica
cost. `make test-replicas` runs them."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import Gateway, smg_command
from tests.support.running_server import MODEL, PROMPT, RunningServer

pytestmark = [
    pytest.mark.replicas,
    pytest.mark.skipif(smg_command() is None, reason="smg is not installed: make test-replicas installs it"),
]

TEXT: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 5, "ignore_eos": True}
STREAM = TEXT | {"max_tokens": 1500, "stream": True}

Replica = Callable[..., RunningServer]
Route = Callable[..., Gateway]


@pytest.fixture
def replica(tiny_llama: Path, tmp_path: Path) -> Iterator[Replica]:
    """`replica(*flags)`: a server that is started, and ready later."""
    started: list[RunningServer] = []

    def start(*flags: str) -> RunningServer:
        own = ("--model", str(tiny_llama), "--served-model-name", MODEL, "--kv-cache-memory", "32MiB")
        log = tmp_path / f"replica{len(started)}"
        started.append(RunningServer(log, *own, "--num-threads", "1", "--drain-endpoint", *flags))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def route(tmp_path: Path) -> Iterator[Route]:
    """`route(*replicas, policy=..., api_key=...)`: smg in front of them, once they are ready."""
    started: list[Gateway] = []

    def start(*replicas: RunningServer, policy: str = "round_robin", api_key: str | None = None) -> Gateway:
        for server in replicas:
            server.wait_for("/ready", 200)
        log = tmp_path / f"smg{len(started)}"
        started.append(Gateway(log, [server.url for server in replicas], policy=policy, api_key=api_key))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()


def answered(server: RunningServer) -> int:
    """How many requests of texts this replica has answered."""
    text = server.http.get("/metrics").text.splitlines()
    own = [line for line in text if line.startswith("pilotfish_http_requests_total") and '"/v1/completions"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in own)


def complete(gateway: Gateway, headers: dict[str, str] | None = None) -> str:
    response = gateway.http.post("/v1/completions", json=TEXT, headers=headers)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


class Reading(threading.Thread):
    """Reads a stream, as far as it gets."""

    def __init__(self, url: str, body: dict[str, Any] = STREAM) -> None:
        super().__init__()
        self._url, self._body = url, body
        self.chunks: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        self.chunks.append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.error = error

    @property
    def complete(self) -> bool:
        return bool(self.chunks) and self.chunks[-1] == "[DONE]" and not any('"error"' in c for c in self.chunks)

    @property
    def text(self) -> str:
        found = [json.loads(chunk) for chunk in self.chunks if chunk != "[DONE]"]
        return "".join(choice["text"] for chunk in found for choice in chunk.get("choices", ()))


def test_replicas_are_registered_with_their_model_and_their_load(replica: Replica, route: Route) -> None:
    """smg takes a server that answers /version for vLLM if nobody tells it otherwise; it reads /v1/loads anyway."""
    first, second = replica(), replica()
    gateway = route(first)
    second.wait_for("/ready", 200)
    gateway.add(second.url, runtime_type="generic")
    known = gateway.workers()
    assert {url: worker["runtime_type"] for url, worker in known.items()} == {first.url: "vllm", second.url: "generic"}
    limit = first.http.get(f"/v1/models/{MODEL}").json()["max_model_len"]
    for worker in known.values():
        (model,) = worker["models"]
        assert (worker["model_id"], model["id"], model["context_length"]) == (MODEL, MODEL, limit)
    reading = Reading(second.url)
    second.wait_until(lambda: bool(reading.chunks), 30)

    def loads() -> dict[str, Any]:
        return {load["worker"]: load for load in gateway.http.get("/get_loads").json()["loads"]}

    gateway.wait_until(lambda: loads().get(second.url, {}).get("num_running_reqs") == 1, 20)
    seen = loads()
    assert 0 < seen[second.url]["token_usage"] < 1
    assert seen[first.url]["num_total_reqs"] == 0
    assert {load["max_running_requests"] for load in seen.values()} == {32}
    reading.join()


def test_keys_sessions_and_request_ids_pass_through(replica: Replica, route: Route) -> None:
    """Of a request's headers smg passes few on; a session's is its routing key, and the key is its own."""
    server = replica("--api-key", "alice=secret")
    gateway = route(server, api_key="secret")
    assert gateway.http.post("/v1/completions", json=TEXT).status_code == 401
    key = {"authorization": "Bearer secret"}
    complete(gateway, key | {"x-smg-routing-key": "chat-17", "x-request-id": "mine-3"})
    line = next(line for line in server.log.read_text().splitlines() if "POST /v1/completions" in line)
    assert "session=chat-17" in line
    assert "request_id=mine-3" in line
    assert "tenant=alice" in line
    assert gateway.workers()[server.url]["runtime_type"] == "vllm"


def test_a_replica_killed_in_mid_stream_takes_only_its_own_streams_along(replica: Replica, route: Route) -> None:
    servers = replica(), replica()
    gateway = route(*servers)
    expected = Reading(servers[0].url)
    expected.join()
    readings = [Reading(gateway.url) for _ in range(4)]
    gateway.wait_until(lambda: all(len(reading.chunks) > 5 for reading in readings), 30)
    assert [answered(server) - 1 + (server is servers[1]) for server in servers] == [0, 0]  # all are still running
    victim = servers[1]
    engine = victim.engine
    victim.process.kill()
    engine.kill()
    texts = [complete(gateway) for _ in range(12)]  # at once: smg tries the other where one does not answer
    assert set(texts) == {complete(gateway)}
    for reading in readings:
        reading.join(60)
    whole = [reading for reading in readings if reading.complete]
    assert len(whole) == 2
    assert {reading.text for reading in whole} == {expected.text}
    for cut in set(readings) - set(whole):
        assert expected.text.startswith(cut.text.removesuffix("[DONE]"))  # no wrong text, and no end that looks right
        assert not cut.complete
    gateway.wait_until(lambda: gateway.ready() == {servers[0].url}, 30)


def test_a_replica_is_drained_and_taken_back_without_a_failed_request(replica: Replica, route: Route) -> None:
    servers = replica(), replica()
    gateway = route(*servers)
    stop = threading.Event()

    def ask() -> list[str]:
        texts = []
        while not stop.is_set():
            texts.append(complete(gateway))
        return texts

    drained, other = servers
    reading = Reading(drained.url)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            gateway.wait_until(lambda: all(answered(server) > 2 for server in servers), 30)
            assert drained.http.post("/drain?wait=60").json()["draining"]
            assert reading.complete or reading.chunks  # what ran went on
            gateway.wait_until(lambda: gateway.ready() == {other.url}, 30)
            drained.wait_until(lambda: drained.http.get("/drain").json()["in_flight"] == 0, 30)
            before, others = answered(drained), answered(other)
            other.wait_until(lambda: answered(other) > others + 5, 30)
            assert answered(drained) == before
            drained.http.delete("/drain")
            gateway.wait_until(lambda: len(gateway.ready()) == 2, 30)
            drained.wait_until(lambda: answered(drained) > before + 2, 30)
        finally:
            stop.set()
        texts = {text for future in asking for text in future.result()}
    assert len(texts) == 1
    reading.join()
    assert reading.complete


def test_a_replica_that_is_added_gets_its_share(replica: Replica, route: Route) -> None:
    first, second = replica(), replica()
    gateway = route(first)
    texts = {complete(gateway) for _ in range(3)}
    second.wait_for("/ready", 200)
    gateway.add(second.url)
    texts |= {complete(gateway) for _ in range(10)}
    assert answered(second) == 5
    assert len(texts) == 1


@pytest.mark.parametrize("count", [2, 3])
def test_cache_aware_routing_finds_more_of_conversations(count: int, replica: Replica, route: Route) -> None:
    """The same conversations, taken in another order in each turn, by both policies. How many prompt tokens were
    computed is counted, so it is the same on any machine."""
    servers = [replica() for _ in range(count)]
    uncached: dict[str, int] = {}
    for policy in ("round_robin", "cache_aware"):
        gateway = route(*servers, policy=policy)
        order, found, asked = random.Random(7), 0, 0
        turns: list[str] = [f"{policy} {i} " + "abcdefgh"[i] * 60 for i in range(7)]
        for turn in range(6):
            for i in order.sample(range(7), 7):
                body = TEXT | {"prompt": turns[i], "max_tokens": 24}
                response = gateway.http.post("/v1/completions", json=body).json()
                turns[i] += response["choices"][0]["text"] + f" {turn} and then? " + "klmnopq"[i] * 40
                usage = response["usage"]
                asked += usage["prompt_tokens"]
                found += usage["prompt_tokens_details"]["cached_tokens"]
        uncached[policy] = asked - found
        gateway.stop()
    print(uncached)
    assert uncached["cache_aware"] <= 0.7 * uncached["round_robin"]
