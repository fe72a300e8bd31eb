"""What routers, gateways and balancers rely on, from a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pilotfish.engine.memory.cache_events import BlockStored, EventBatch
from tests.support.event_subscriber import Subscriber
from tests.support.ports import free_port
from tests.support.running_server import FIXED, MODEL, RunningServer

pytestmark = pytest.mark.process

LOADS = "/v1/loads?include=core,disagg,queues,memory"
LONG = {"model": MODEL, "prompt": "The sea was calm", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def events() -> tuple[str, str]:
    return f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def replica(
    events: tuple[str, str], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    running = RunningServer(
        tmp_path_factory.mktemp("replica") / "log", "--model", str(tiny_llama), "--kv-cache-memory", "16MiB",
        "--vllm-metrics", "--drain-endpoint", "--tenant-header", "X-Tenant", "--served-model-name", MODEL,
        "--kv-events-endpoint", events[0], "--kv-events-replay-endpoint", events[1],
    )  # fmt: skip
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


def samples(server: RunningServer) -> dict[str, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_loads_and_gauges_follow_a_stream(replica: RunningServer) -> None:
    before = samples(replica)
    with replica.http.stream("POST", "/v1/completions", json=LONG) as stream:
        chunks = stream.iter_lines()
        for _ in range(20):
            next(chunks)
        (load,) = replica.http.get(LOADS).json()["loads"]
        during = samples(replica)
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (1, 0)
    assert 0 < load["num_used_tokens"] < load["max_total_num_tokens"]
    assert load["gen_throughput"] > 0
    for names in (
        ("vllm:num_requests_running", "pilotfish_sequences_running"),
        ("vllm:kv_cache_usage_perc", "pilotfish_kv_cache_usage_ratio"),
    ):
        assert during[names[0]] == during[names[1]] > 0
    replica.wait_until(lambda: replica.http.get(LOADS).json()["loads"][0]["num_total_reqs"] == 0, 10)
    after = samples(replica)
    blocks = after["pilotfish_kv_blocks_total"]
    assert load["max_total_num_tokens"] == blocks * load["num_used_tokens"] / (load["token_usage"] * blocks)
    assert after["vllm:generation_tokens_total"] > before["vllm:generation_tokens_total"]
    text = replica.http.get("/metrics").text
    assert f'num_gpu_blocks="{blocks:.0f}"' in next(
        line for line in text.splitlines() if "vllm:cache_config_info{" in line
    )
    drafted = after["vllm:spec_decode_num_draft_tokens_total"]
    assert after["vllm:spec_decode_num_accepted_tokens_total"] <= drafted
    assert after["vllm:spec_decode_num_drafts_total"] <= drafted


def test_the_deep_probe_generates(replica: RunningServer) -> None:
    before = samples(replica)
    assert replica.http.get("/health_generate").status_code == 200
    after = samples(replica)
    assert after["pilotfish_generated_tokens_total"] == before["pilotfish_generated_tokens_total"] + 1


def test_a_drain_waits_for_streams(replica: RunningServer) -> None:
    """A stream that runs goes on to its end; balancers are sent away meanwhile, and connections closed."""
    chunks: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{replica.url}/v1/completions", json=LONG | {"max_tokens": 300}) as stream:
            chunks.extend(line for line in stream.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        replica.wait_until(lambda: bool(chunks), 20)
        assert replica.http.post("/drain").json() == {"draining": True, "in_flight": 1}
        assert replica.status("/ready") == 503
        assert replica.http.post("/drain?wait=60").json() == {"draining": True, "in_flight": 0}
        reading.join(10)
        assert chunks[-1] == "data: [DONE]"
        late = replica.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})
        assert (late.status_code, late.headers["connection"]) == (200, "close")
    finally:
        replica.http.delete("/drain")
        reading.join()
    assert replica.status("/ready") == 200


def test_a_session_is_passed_on(replica: RunningServer, events: tuple[str, str]) -> None:
    """To KV events, the log and the response; tenants of the header do not share prefixes."""
    prompt = "A fox that had never seen the sea went to look at it, and sat down on a stone. " * 4
    body = FIXED | {"prompt": prompt, "max_tokens": 4}
    body |= body.pop("extra_body")

    def cached(tenant: str, session: str) -> int:
        headers = {"x-session-id": session, "x-tenant": tenant}
        response = replica.http.post("/v1/completions", json=body, headers=headers)
        assert response.headers.get("x-session-id") == (session if session.isascii() else None)
        tokens: int = response.json()["timings"]["cached_tokens"]
        return tokens

    assert cached("a", "chat-17") == 0
    assert cached("a", "chat-18") > 0
    assert cached("b", "chat-19") == 0
    assert "session=chat-17" in replica.log.read_text()
    subscriber = Subscriber(*events)
    try:
        told = [msgspec.msgpack.decode(data, type=EventBatch) for _, data in subscriber.replay(0)]
    finally:
        subscriber.close()
    sessions = {event.session_id for batch in told for event in batch.events if isinstance(event, BlockStored)}
    assert {"chat-17", "chat-19"} <= sessions  # all that the second one sent was known


def test_smgs_name_for_a_session_will_do(replica: RunningServer) -> None:
    headers = {"x-smg-routing-key": "chat-20"}
    assert replica.http.get("/v1/models", headers=headers).headers["x-session-id"] == "chat-20"
    assert replica.http.get("/v1/models", headers=headers | {"x-session-id": "b"}).headers["x-session-id"] == "b"


@pytest.mark.parametrize("session", ["", "a b", "x" * 129, 'a"b'])
def test_what_is_no_id_is_not_repeated(replica: RunningServer, session: str) -> None:
    assert "x-session-id" not in replica.http.get("/v1/models", headers={"x-session-id": session}).headers
