"""A real server with many clients, clients that disconnect, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support.running_server import FIXED, MODEL, PROMPT, RunningServer

pytestmark = pytest.mark.process


async def test_64_requests_at_once_get_the_answers_they_get_alone(server: RunningServer) -> None:
    prompts = [f"{PROMPT} {i % 8}" for i in range(64)]
    async with server.async_client() as client:

        async def ask(i: int) -> str:
            asked: dict[str, Any] = {"model": MODEL, "prompt": prompts[i], "max_tokens": 8, "seed": i % 8}
            if i % 2:
                return (await client.completions.create(**asked)).choices[0].text
            stream = await client.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(ask(i) for i in range(64)))
        alone = [await ask(i) for i in range(8)]
    assert together == alone * 8
    assert server.metric("pilotfish_sequences_running") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    aborted = server.metric('pilotfish_requests_total{outcome="abort"}')
    body = {"model": MODEL, "prompt": [7] * 300, "max_tokens": 1700, "ignore_eos": True, "stream": stream, "n": 2}
    body["speculation"] = "off"
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        if stream:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                assert (await anext(response.aiter_lines())).startswith("data: ")
                assert server.metric("pilotfish_kv_blocks_used") >= 300 / 16
        else:
            asked = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.to_thread(server.wait_until, lambda: server.metric("pilotfish_sequences_running") == 2)
            asked.cancel()
    server.wait_until(lambda: server.metric('pilotfish_requests_total{outcome="abort"}') == aborted + 2)
    server.wait_until(lambda: server.metric("pilotfish_kv_blocks_used") == 0)
    assert server.metric("pilotfish_sequences_running") == 0


def test_metrics_count_the_work_that_was_done(server: RunningServer, client: openai.OpenAI) -> None:
    names = (
        "pilotfish_generated_tokens_total",
        "pilotfish_prompt_tokens_total",
        'pilotfish_requests_total{outcome="length"}',
        'pilotfish_requests_total{outcome="refused"}',
        "pilotfish_time_to_first_token_seconds_count",
        "pilotfish_inter_token_latency_seconds_count",
        "pilotfish_request_queue_seconds_count",
        'pilotfish_drafted_tokens_total{drafter="ngram"}',
        'pilotfish_accepted_tokens_total{drafter="ngram"}',
    )
    before = [server.metric(name) for name in names]
    completion = client.completions.create(**FIXED | {"prompt": [9, 8, 7] * 5, "max_tokens": 20})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=9)
    timings = (completion.model_extra or {})["timings"]
    prompt_tokens = 15 - timings["cached_tokens"]
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    own = timings["drafters"].get("ngram", {"drafted_tokens": 0, "accepted_tokens": 0})
    assert grown == [20, prompt_tokens, 1, 1, 1, 19, 1, own["drafted_tokens"], own["accepted_tokens"]]
    assert server.metric("pilotfish_kv_blocks_total") > 100
    for phase in ("plan", "draft", "forward", "sample", "commit"):
        name = f'pilotfish_step_phase_seconds_count{{phase="{phase}"}}'
        assert server.metric(name) == server.metric("pilotfish_engine_steps_total")


def test_engine_memory_is_reported_before_the_first_request(server: RunningServer) -> None:
    told = server.metric('pilotfish_rank_memory_bytes{kind="resident",rank="0"}')
    assert told == pytest.approx(server.engine.memory_info().rss, rel=0.5)
    assert server.metric("pilotfish_engine_up") == 1


def test_a_scrape_does_not_wait_for_the_engine(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    engine = server.engine
    with httpx.Client(base_url=server.url) as other, other.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        engine.suspend()
        try:
            for _ in range(5):  # which would wait for ever, and so run into the client's own timeout
                assert server.metric("pilotfish_engine_steps_total") > 0
        finally:
            engine.resume()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_no_clients_string_becomes_a_label(server: RunningServer, client: openai.OpenAI) -> None:
    odd = "odd-string-of-a-client"
    for path in (f"/{odd}", f"/v1/models/{odd}", f"/v1/{odd}/completions"):
        assert server.http.get(path).status_code == 404
    for wrong in ({"model": odd}, {"extra_body": {"speculation": odd}}, {"user": odd, "max_tokens": 1}):
        with contextlib.suppress(openai.APIStatusError):
            client.completions.create(**{"model": MODEL, "prompt": odd} | wrong, extra_headers={"x-request-id": odd})
    text = server.http.get("/metrics").text
    assert odd not in text
    assert 'pilotfish_http_requests_total{route="/v1/models/{id}",status="404"}' in text
    assert 'pilotfish_http_requests_total{route="other",status="404"}' in text
    assert 'pilotfish_http_requests_total{route="/v1/completions",status="200"}' in text


def test_the_api_process_holds_no_torch(server: RunningServer) -> None:
    libraries = [entry.path for entry in psutil.Process(server.process.pid).memory_maps()]
    assert libraries
    assert not [path for path in libraries if "torch" in path]
    assert [entry.path for entry in server.engine.memory_maps() if "torch" in entry.path]  # so they are to be seen
