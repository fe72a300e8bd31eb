"""The application around a scripted engine, whatever the engine returns, and whenever."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from pilotfish.engine.request import GRAMMAR_LIMIT, Delta, Request, TokenLogprobs
from pilotfish.errors import EngineDeadError
from pilotfish.logs import JsonFormatter
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import ApiError, openai_error
from pilotfish.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, Script, say


@pytest.fixture
def serving(tokenizer: Tokenizer) -> Callable[..., Any]:
    @asynccontextmanager
    async def opened(script: Script = lambda request: say(request, [1]), **config: Any) -> AsyncIterator[ScriptedApp]:
        made = ScriptedApp(script, ServerConfig(**config), tokenizer)
        async with made.http:
            yield made

    return opened


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a stream, and check its end."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0, 1], [2, 3]]])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_within_a_delta_cuts_as_it_does_token_by_token(
    serving: Any, tokenizer: Tokenizer, groups: list[list[int]], stream: bool
) -> None:
    ids = tokenizer.encode("light and water", add_special_tokens=False)
    stop = next(i for i, id_ in enumerate(ids) if i >= 2 and len(tokenizer.token(id_)) >= 2)
    text = tokenizer.decode(ids[:stop])
    parts = [[ids[stop - 2 + i] for i in group if stop - 2 + i < len(ids)] for group in groups]

    def script(request: Request) -> list[Delta]:
        return say(request, ids[: stop - 2], *parts, ids[:1])

    want = text + tokenizer.token(ids[stop])[:1]
    async with serving(script) as served:
        response = await served.complete(
            max_tokens=40, stop=[tokenizer.token(ids[stop])[1:]], stream=stream, logprobs=0,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )  # fmt: skip
        if stream:
            chunks = events(response)
            shown = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
            usage, reason = chunks[-1]["usage"], chunks[-2]["choices"][0]["finish_reason"]
            tokens = [token for chunk in chunks[:-1] for token in chunk["choices"][0]["logprobs"]["tokens"]]
        else:
            body = response.json()
            choice, usage = body["choices"][0], body["usage"]
            shown, reason, tokens = choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]
        assert (shown, reason) == (want, "stop")
        assert usage["completion_tokens"] == stop + 1
        assert tokens == [tokenizer.token(id_) for id_ in ids[: stop + 1]]
        assert len(served.engine.aborted) == 1
        assert served.metric("pilotfish_requests_total", outcome="stop") == 1


@pytest.mark.parametrize(("drafter", "predicted"), [("ngram", (0, 0)), ("prediction", (1, 7))])
async def test_a_stopped_answer_counts_what_was_drafted_for_it(
    serving: Any, tokenizer: Tokenizer, drafter: str, predicted: tuple[int, int]
) -> None:
    ids = tokenizer.encode("abcdef", add_special_tokens=False)

    def script(request: Request) -> list[Delta]:
        return say(request, ids[:1], ids[1:3], ids[3:], drafted=8, accepted=5, drafter=drafter)

    async with serving(script) as served:
        response = (await served.complete(stop=tokenizer.token(ids[1]))).json()
        assert response["usage"]["completion_tokens"] == 2
        # One delta was looked at, of which one token counts: 8 were drafted for it, at most 1 of them is in the answer.
        timings = response["timings"]
        assert (timings["drafted_tokens"], timings["accepted_tokens"], timings["drafter"]) == (8, 1, drafter)
        own = {"steps": 1, "drafted_tokens": 8, "accepted_tokens": 1, "mean_length": 8.0}
        assert timings["drafters"] == {drafter: own}
        details = response["usage"]["completion_tokens_details"]
        names = ("accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens")
        assert tuple(details[name] for name in names) == (*predicted, 0)


@pytest.mark.parametrize(
    ("state", "code", "retry"), [("starting", "model_loading", True), ("dead", "engine_dead", False)]
)
async def test_an_engine_that_is_loading_or_dead_is_503(serving: Any, state: str, code: str, retry: bool) -> None:
    async with serving() as served:
        served.engine.state = state
        for response in (await served.complete(), await served.chat(), await served.chat(stream=True)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == code
            assert ("retry-after" in response.headers) == retry
        assert (await served.http.get("/ready")).status_code == 503
        assert (await served.http.get("/health")).status_code == (503 if state == "dead" else 200)
        assert (await served.http.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert served.metric("pilotfish_requests_total", outcome="refused") == 3


async def test_a_closed_gate_refuses_requests_and_lets_admitted_ones_finish(serving: Any) -> None:
    go = asyncio.Event()
    async with serving(lambda request: [*say(request, [5], [6])[:1], go, *say(request, [5], [6])[1:]]) as served:
        first = asyncio.create_task(served.complete())
        gate = served.app.state.service.gate
        await until(lambda: gate.in_flight == 1)
        gate.close()
        response = await served.complete()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_stopping")
        assert int(response.headers["retry-after"]) > 0
        assert (await served.http.get("/ready")).status_code == 503
        assert (await served.http.get("/health")).status_code == 200
        assert not await gate.wait_idle(0.01)
        go.set()
        assert (await first).json()["usage"]["completion_tokens"] == 2
        assert await gate.wait_idle(1)


async def test_a_full_queue_is_429_until_there_is_room(serving: Any) -> None:
    go = asyncio.Event()
    async with serving(lambda request: [go, *say(request, [5])], max_queue=1) as served:
        running = [asyncio.create_task(served.complete(n=2)), asyncio.create_task(served.complete(stream=True))]
        await until(lambda: len(served.engine.requests) == 3)
        response = await served.complete()
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) > 0
        assert int(response.headers["retry-after-ms"]) > 0
        assert (await served.complete(n=4)).status_code == 429
        response = await served.complete(n=128, prompt=["a"] * 33)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
        go.set()
        assert [answered.status_code for answered in await asyncio.gather(*running)] == [200, 200]
        assert (await served.complete()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_ends_its_requests(serving: Any, stream: bool, n: int) -> None:
    never = asyncio.Event()
    async with serving(lambda request: [*say(request, [5], [6])[:1], never], max_queue=9) as served:
        sent, left = asyncio.Event(), asyncio.Event()
        body = json.dumps({"model": "tiny", "prompt": "a", "n": n, "stream": stream}).encode()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        task = asyncio.create_task(served.app(scope, receive, send))
        await until(lambda: len(served.engine.requests) == n and (sent.is_set() or not stream))
        left.set()
        await asyncio.wait_for(task, 5)
        assert len(served.engine.aborted) == n
        assert served.app.state.service.gate.in_flight == 0
        assert served.metric("pilotfish_requests_total", outcome="abort") == n


async def test_an_engine_that_dies_in_mid_stream_ends_the_stream_with_an_error(serving: Any) -> None:
    async with serving(lambda request: [*say(request, [5], [6])[:1], EngineDeadError("killed by a test")]) as served:
        *_, last = events(await served.chat(stream=True))
        assert last["error"]["type"] == "server_error"
        assert last["error"]["code"] == "engine_dead"
        response = await served.chat(n=2)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert served.metric("pilotfish_requests_total", outcome="error") >= 2
        assert served.app.state.service.gate.in_flight == 0


@pytest.mark.parametrize(("reason", "status"), [("abort", 503), ("error", 500)])
async def test_a_request_that_the_engine_gives_up_is_an_error(serving: Any, reason: Any, status: int) -> None:
    async with serving(lambda request: [Delta(request_id=request.id, finish_reason=reason)]) as served:
        response = await served.complete()
        assert response.status_code == status
        assert response.json()["error"]["type"] == "server_error"
        assert served.metric("pilotfish_requests_total", outcome=reason) == 1


async def test_an_unexpected_error_is_500_with_a_request_id_and_no_details(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(lambda request: [ZeroDivisionError("a secret")]) as served:
        with caplog.at_level(logging.ERROR):
            response = await served.complete()
            chunks = events(await served.complete(stream=True))
        assert response.status_code == 500
        for error in (response.json()["error"], chunks[-1]["error"]):
            assert (error["type"], error["code"]) == ("server_error", "internal_error")
            assert "secret" not in error["message"]
        request_id = response.headers["x-request-id"]
        assert request_id in response.json()["error"]["message"]
        assert request_id in caplog.text
        assert "ZeroDivisionError: a secret" in caplog.text


def test_an_error_may_quote_lone_surrogates() -> None:
    error = json.loads(bytes(ApiError(400, "not \ud800", param="\ud801").response(openai_error).body))["error"]
    assert (error["message"], error["param"]) == ("not \\ud800", "\\ud801")


@pytest.mark.parametrize("given", ["mine-1.2:3", "a" * 128])
async def test_a_clients_own_request_id_comes_back(serving: Any, given: str) -> None:
    async with serving() as served:
        response = await served.http.get("/version", headers={"x-request-id": given})
        assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "two words", "<script>"])
async def test_an_invalid_request_id_is_replaced(serving: Any, given: str) -> None:
    async with serving() as served:
        ids = [
            (await served.http.get(path, headers={"x-request-id": given})).headers["x-request-id"]
            for path in ("/version", "/nowhere")
        ]
        assert all(id_.startswith("req-") for id_ in ids)
        assert ids[0] != ids[1]


@pytest.mark.parametrize("counted", [True, False])
async def test_a_body_that_is_too_large_is_413(serving: Any, counted: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b" " * 50

    async with serving(max_body_bytes=100) as served:
        response = await served.http.post("/v1/completions", content=b" " * 200 if counted else chunks())
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert "100 bytes" in response.json()["error"]["message"]
        assert (await served.complete()).status_code == 200


async def test_a_content_length_that_is_no_number_is_ignored(serving: Any) -> None:
    """A superscript two is a digit to str.isdigit, but not to int."""
    async with serving() as served:
        headers = [(b"content-length", "\xb2".encode("latin-1"))]
        assert (await served.http.request("GET", "/version", headers=headers)).status_code == 200


async def test_every_route_but_those_for_probes_needs_a_key(serving: Any) -> None:
    async with serving(api_key=("one", "zwei-ä")) as served:
        for headers in ({}, {"authorization": "Bearer two"}, {"authorization": "one"}, {"authorization": "Bearer "}):
            response = await served.http.post("/v1/completions", content=b"not even read", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await served.http.get(path)).status_code == 200
        for key in (b"one", "zwei-ä".encode()):
            raw = [(b"authorization", b"Bearer " + key)]
            assert (await served.http.get("/v1/models", headers=raw)).status_code == 200


@pytest.mark.parametrize("final", [False, True])
async def test_usage_may_be_in_every_chunk(serving: Any, final: bool) -> None:
    """The first chunk of a chat has its role alone; a delta of two tokens counts as two."""
    options = {"include_usage": final, "continuous_usage_stats": True}
    async with serving(lambda request: say(request, [5], [6, 7], [8])) as served:
        chunks = events(await served.chat(stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == [0, 1, 3, 4, 4, 4][: 5 + final]
        assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
        assert (chunks[-1]["choices"] == []) == final
        assert [("timings" in chunk) for chunk in chunks] == [False] * (4 + final) + [True]


async def test_seeds_and_limits_reach_the_engine(serving: Any) -> None:
    async with serving(max_queue=8) as served:
        await served.complete(n=3, seed=11, max_tokens=10**400, top_k=10**400, speculation="off")
        first, *others = served.engine.requests
        assert first.params.seed == 11
        assert len({request.params.seed for request in served.engine.requests}) == 3
        assert first.params.max_tokens == INFO.max_model_len - len(first.prompt_ids)
        assert first.params.top_k == INFO.vocab_size
        assert all(request.speculation == "off" for request in [first, *others])
        await served.complete()
        assert served.engine.requests[-1].params.seed == 7  # the engine's, which a configured seed makes reproducible
        assert served.engine.requests[-1].params.max_tokens == 16
        await served.chat()
        chat = served.engine.requests[-1]
        assert chat.params.max_tokens == INFO.max_model_len - len(chat.prompt_ids)


async def test_best_of_returns_the_likeliest_by_the_mean(serving: Any, tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc", add_special_tokens=False)

    def script(request: Request) -> list[Delta]:
        # By the sum the first would win, by the mean the third.
        choice = int(request.id.rpartition("-")[2])
        values = {0: [(a, -1.0)], 1: [(b, -3.0)], 2: [(c, -0.5)] * 4}[choice]
        logprobs = tuple(TokenLogprobs(id_, value) for id_, value in values)
        return [
            Delta(
                request_id=request.id,
                token_ids=tuple(id_ for id_, _ in values),
                logprobs=logprobs,
                finish_reason="length",
            )
        ]

    async with serving(script) as served:
        response = (await served.complete(best_of=3, n=2)).json()
        assert [choice["text"] for choice in response["choices"]] == ["cccc", "a"]
        assert [choice["index"] for choice in response["choices"]] == [0, 1]
        assert all(choice["logprobs"] is None for choice in response["choices"])
        assert response["usage"]["completion_tokens"] == 6


async def test_latencies_are_counted_per_token(serving: Any) -> None:
    async with serving(lambda request: say(request, [5], [6, 7, 8], [9, 10])) as served:
        await served.complete()
        assert served.metric("pilotfish_time_to_first_token_seconds_count") == 1
        assert served.metric("pilotfish_inter_token_latency_seconds_count") == 5
        assert served.metric("pilotfish_request_duration_seconds_count") == 1
        rate = served.metric("pilotfish_request_decode_tokens_per_second_sum", model="", drafter="none")
        gaps = served.metric("pilotfish_inter_token_latency_seconds_sum")
        assert rate == pytest.approx(5 / gaps, rel=0.05)


async def test_an_engine_that_makes_no_steps_is_not_ready(serving: Any) -> None:
    go = asyncio.Event()
    async with serving(lambda request: [go, *say(request, [5])]) as served:
        running = asyncio.create_task(served.complete())
        gate = served.app.state.service.gate
        await until(lambda: gate.in_flight == 1)
        assert (await served.http.get("/ready")).status_code == 200
        gate.busy_since -= 100
        response = await served.http.get("/ready")
        assert (response.status_code, response.json()["status"]) == (503, "stuck")
        go.set()
        await running
        assert (await served.http.get("/ready")).status_code == 200


async def test_every_field_of_a_requests_line_in_the_log_is_documented(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.requests")
    async with serving(lambda request: say(request, [1], [2, 3], drafted=2, accepted=1), log_prompts=True) as served:
        assert (await served.complete()).status_code == 200
        assert (await served.complete(temperature=9)).status_code == 400
    written = [
        json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "server.requests"
    ]
    names = {name for line in written for name in line} | {"trace_id"}  # which only a traced request has
    assert {"request_id", "ttft_ms", "prompts", "error", "acceptance"} <= names
    table = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE))))
    assert names - {"time", "level", "logger", "message"} <= documented


async def test_sampling_parameters_of_other_servers_reach_the_engine(serving: Any, tokenizer: Tokenizer) -> None:
    async with serving() as served:
        response = await served.complete(
            typical_p=0.5, allowed_token_ids=[5, 6], bad_words=["light", " light", "wat er"]
        )
        assert response.status_code == 200, response.text
        params = served.engine.requests[0].params
        assert (params.typical_p, params.allowed_token_ids) == (0.5, (5, 6))
        spelled = ["light", " light", "wat er", " wat er"]
        assert params.bad_words == tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in spelled)
        wrong: list[dict[str, Any]] = [
            {"typical_p": 0}, {"allowed_token_ids": []}, {"allowed_token_ids": [512]}, {"bad_words": [""]},
            {"bad_words": ["a"] * 257}, {"bad_words": "a"}, {"bad_words": ["\x00" * 201]},
        ]  # fmt: skip
        for fields in wrong:
            error = (await served.complete(**fields)).json()["error"]
            assert error["param"] == next(iter(fields))


async def test_echoed_special_tokens_have_their_length_in_text_offsets(serving: Any) -> None:
    async with serving(
        lambda request: [
            msgspec.structs.replace(delta, prompt_logprobs=(None,) * len(request.prompt_ids))
            for delta in say(request, [5])
        ]
    ) as served:
        prompt = "<|im_start|>user\nhi<|im_end|>\n"
        choice = (await served.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0)).json()["choices"][0]
        assert choice["text"] == prompt
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        assert all(prompt.startswith(token, at) for token, at in zip(tokens, offsets, strict=True))
        assert tokens[0] == "<|im_start|>"


@pytest.mark.parametrize("prompt", [None, "", [""]])
async def test_an_empty_prompt_is_the_beginning_of_a_document(serving: Any, tokenizer: Tokenizer, prompt: Any) -> None:
    async with serving() as served:
        response = await served.complete(prompt=prompt, echo=True)
        assert response.status_code == 200, response.text
        assert served.engine.requests[0].prompt_ids == (0,)
        assert tokenizer.token(0) == "<|endoftext|>"
        assert response.json()["choices"][0]["text"] == ""


async def test_a_special_token_may_be_a_stop_string(serving: Any, tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("light", add_special_tokens=False)
    async with serving(lambda request: say(request, [*word, 1], [*word, 1])) as served:
        for stop, text, tokens in (
            ("<|im_start|>", "light", len(word) + 1),
            ("<|im_end|>", "lightlight", 2 * len(word) + 2),
        ):
            body = (await served.complete(stop=stop, max_tokens=50)).json()
            assert body["choices"][0]["text"] == text
            assert body["usage"]["completion_tokens"] == tokens
        body = (await served.complete(stop="t<|im_start|>", max_tokens=50, include_stop_str_in_output=True)).json()
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("light<|im_start|>", "stop")


async def test_max_tokens_of_minus_one_is_what_the_context_has_room_for(serving: Any) -> None:
    async with serving() as served:
        await served.complete(max_tokens=-1)
        await served.chat(max_completion_tokens=-1)
        for request in served.engine.requests:
            assert request.params.max_tokens == INFO.max_model_len - len(request.prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_service_tier_is_answered_if_it_is_asked_for(serving: Any, stream: bool) -> None:
    async with serving() as served:
        for tier, wanted in ((None, None), ("auto", "default"), ("flex", "default")):
            for ask in (served.chat, served.complete):
                response = await ask(stream=stream, service_tier=tier)
                for body in events(response) if stream else [response.json()]:
                    assert body.get("service_tier") == wanted
                    assert ("service_tier" in body) == (wanted is not None)


async def test_tokenizer_info_names_the_special_tokens(serving: Any, tokenizer: Tokenizer) -> None:
    async with serving() as served:
        info = (await served.http.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|im_start|>", "<|im_end|>", None)
        assert info["chat_template"] == tokenizer.chat_template
        assert info["model_max_length"] == INFO.max_model_len


async def test_a_grammar_that_cannot_be_followed_further_is_the_clients_error() -> None:
    """Not the server's: it is the grammar that is too large, and the next request may have another."""
    limit = f"{GRAMMAR_LIMIT}: too many items"
    served = ScriptedApp(
        lambda request: [Delta(request_id=request.id, token_ids=(), finish_reason="error", error=limit)]
    )
    response = await served.complete()
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (400, "grammar_too_large", limit)
