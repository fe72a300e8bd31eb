"""The HTTP API as its clients see it: OpenAI's own client, a real server process, a real engine on a small model."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from running_server import RunningServer

MODEL = "llama"
PROMPT = "The sea was calm and the light on the water"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is light?"}]
FIXED: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 5, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = RunningServer(log, "--model", str(tiny_llama), "--kv-cache-memory", "16MiB", "--max-num-seqs", "16")
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def tokens_of(server: RunningServer, text: str) -> list[int]:
    response = server.http.post("/tokenize", json={"model": MODEL, "prompt": text})
    assert response.status_code == 200
    return response.json()["tokens"]


# Completions


def test_a_completion_has_text_usage_and_timings(server: RunningServer, client: openai.OpenAI) -> None:
    completion = client.completions.create(**FIXED, max_tokens=12)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == MODEL
    assert abs(completion.created - time.time()) < 60
    assert completion.system_fingerprint
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokens_of(server, PROMPT))
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    timings = (completion.model_extra or {})["timings"]
    assert 0 <= timings["queue_ms"] <= timings["ttft_ms"]
    seconds = timings["decode_ms"] / 1000
    assert timings["tokens_per_second"] == pytest.approx(11 / seconds, rel=0.01)
    details = usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == timings["accepted_tokens"]
    assert details.rejected_prediction_tokens == timings["drafted_tokens"] - timings["accepted_tokens"]


def test_a_stream_is_the_same_text_with_usage_at_its_end(client: openai.OpenAI) -> None:
    whole = client.completions.create(**FIXED, max_tokens=40)
    chunks = list(
        client.completions.create(**FIXED, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 40
    assert (last.model_extra or {})["timings"]["ttft_ms"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_usage_the_last_chunk_has_timings(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(**FIXED, max_tokens=4, n=2, stream=True))
    assert [("timings" in (chunk.model_extra or {})) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_a_prompt_may_be_text_or_ids_or_several_of_either(server: RunningServer, client: openai.OpenAI) -> None:
    other = "def f(x):"
    ids, other_ids = tokens_of(server, PROMPT), tokens_of(server, other)
    asked = FIXED | {"max_tokens": 8}

    def texts(prompt: Any) -> list[str]:
        choices = client.completions.create(**asked | {"prompt": prompt}).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.text for choice in choices]

    alone = texts(PROMPT)
    assert texts(ids) == texts([PROMPT]) == texts([ids]) == alone
    assert texts([PROMPT, other]) == texts([ids, other_ids]) == alone + texts(other)
    both = client.completions.create(**asked | {"prompt": [PROMPT, other], "n": 2})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [both.choices[0].text, both.choices[2].text] == texts([PROMPT, other])
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(ids) + len(other_ids)
    assert both.usage.completion_tokens == 4 * 8


def test_logprobs_are_of_the_texts_tokens(client: openai.OpenAI) -> None:
    choice = client.completions.create(**FIXED, max_tokens=12, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for i, (token, logprob, top) in enumerate(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ):
        assert logprob <= 0
        assert top[token] == logprob
        assert len(top) in (3, 4)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5
        if not token.startswith(("bytes:", "<|")):  # part of a character; a special token, which text leaves out
            assert choice.text.startswith(token, (logprobs.text_offset or [])[i])


def test_a_streams_logprobs_are_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(**FIXED, max_tokens=12, logprobs=2).choices[0].logprobs
    assert whole is not None
    chunks = list(client.completions.create(**FIXED, max_tokens=12, logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts if part for item in getattr(part, name)] == getattr(whole, name)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_is_the_prompt_with_its_logprobs(
    server: RunningServer, client: openai.OpenAI, stream: bool
) -> None:
    text = PROMPT + " où 🐟"
    asked = {"model": MODEL, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))
        shown = "".join(chunk.choices[0].text for chunk in chunks)
        (logprobs,) = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    else:
        completion = client.completions.create(**asked)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 0
        shown, logprobs = completion.choices[0].text, completion.choices[0].logprobs
    assert shown == text
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(tokens_of(server, text))
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_echoed_ids_are_scored_as_they_were_generated(server: RunningServer, client: openai.OpenAI) -> None:
    ids = tokens_of(server, PROMPT)
    asked = FIXED | {"prompt": ids, "logit_bias": {"300": 100}}  # a bias that logprobs do not know of
    first = client.completions.create(**asked, max_tokens=1, logprobs=0, echo=True).choices[0]
    again = client.completions.create(model=MODEL, prompt=[*ids, 300], max_tokens=0, logprobs=0, echo=True).choices[0]
    assert first.text == again.text
    assert first.text.startswith(PROMPT)
    assert first.logprobs is not None
    assert again.logprobs is not None
    assert first.logprobs.tokens == again.logprobs.tokens
    assert first.logprobs.text_offset == again.logprobs.text_offset
    mine, theirs = first.logprobs.token_logprobs, again.logprobs.token_logprobs
    assert mine is not None
    assert theirs is not None
    assert len(mine) == len(ids) + 1
    assert mine[1:] == pytest.approx(theirs[1:], abs=1e-4)
    assert mine[0] is theirs[0] is None


def test_the_first_of_several_choices_is_the_one_alone_and_best_of_takes_the_likeliest(client: openai.OpenAI) -> None:
    asked = FIXED | {"max_tokens": 10, "logprobs": 0}
    alone = client.completions.create(**asked).choices[0].text
    four = client.completions.create(**asked, n=4)
    assert four.choices[0].text == alone
    assert len({choice.text for choice in four.choices}) > 1
    means = [sum(choice.logprobs.token_logprobs) / 10 for choice in four.choices]  # type: ignore[union-attr, arg-type]
    best = client.completions.create(**asked, n=1, best_of=4)
    assert len(best.choices) == 1
    assert best.choices[0].text == four.choices[means.index(max(means))].text
    assert best.usage is not None
    assert best.usage.completion_tokens == 40


@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_a_stop_string_ends_the_text_before_it_and_never_shows(
    client: openai.OpenAI, sampling: dict[str, Any], speculation: str
) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60} | sampling
    body = {"ignore_eos": True, "speculation": speculation}
    text = client.completions.create(**asked, extra_body=body).choices[0].text
    stop = next(text[i : i + 3] for i in range(len(text) // 2, len(text) - 3) if text[i : i + 3].isascii())
    want = text[: text.index(stop)]
    whole = client.completions.create(**asked, extra_body=body, stop=["never to be seen", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want, "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens < 60
    streamed = list(client.completions.create(**asked, extra_body=body, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == want
    included = body | {"include_stop_str_in_output": True}
    assert client.completions.create(**asked, extra_body=included, stop=stop).choices[0].text == want + stop
    held_off = body | {"min_tokens": whole.usage.completion_tokens}
    assert client.completions.create(**asked, extra_body=held_off, stop=stop).choices[0].text.startswith(want + stop)


def test_speculation_changes_nothing_but_the_timings(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "la la la la la la la la", "max_tokens": 60, "seed": 9}
    results = {}
    for speculation in ("off", "ngram"):
        body = {"speculation": speculation, "ignore_eos": True, "logit_bias": {"100": 8, "101": 8}}
        completion = client.completions.create(**asked, temperature=0.7, extra_body=body)
        results[speculation] = completion.choices[0].text
        timings = (completion.model_extra or {})["timings"]
        assert (timings["drafted_tokens"] > 0) == (speculation == "ngram")
        assert timings["drafter"] == ("ngram" if speculation == "ngram" else "none")
        assert timings["accepted_tokens"] <= timings["drafted_tokens"]
    assert results["off"] == results["ngram"]


def test_an_end_of_text_token_ends_a_text_and_is_not_in_it(client: openai.OpenAI) -> None:
    end = {"2": 100}  # <|im_end|>
    completion = client.completions.create(model=MODEL, prompt=PROMPT, logit_bias=end, temperature=0, logprobs=1)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 1
    later = client.completions.create(
        model=MODEL, prompt=PROMPT, logit_bias=end, temperature=0, extra_body={"min_tokens": 3}
    )
    assert later.usage is not None
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (4, "stop")


def test_max_tokens_is_16_by_default_and_no_more_than_the_context_has_room_for(client: openai.OpenAI) -> None:
    assert client.completions.create(**FIXED).usage.completion_tokens == 16  # type: ignore[union-attr]
    long = client.completions.create(**FIXED | {"prompt": [300] * 2040}, max_tokens=10**9)
    assert long.usage is not None
    assert (long.usage.total_tokens, long.choices[0].finish_reason) == (2048, "length")


def test_a_prompt_seen_before_comes_from_the_cache(client: openai.OpenAI) -> None:
    prompt = list(range(40, 140))
    for cached in (False, True):
        usage = client.completions.create(**FIXED | {"prompt": prompt}, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert bool(usage.prompt_tokens_details.cached_tokens) == cached
    assert usage.prompt_tokens_details.cached_tokens >= 80


# Chat


def test_a_chat_uses_the_models_template(server: RunningServer, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, seed=1)
    assert chat.id.startswith("chatcmpl-")
    assert chat.object == "chat.completion"
    (choice,) = chat.choices
    assert choice.message.role == "assistant"
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is light?<|im_end|>\n<|im_start|>assistant\n"
    )
    as_text = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, seed=1, extra_body={"add_special_tokens": False}
    )
    assert choice.message.content == as_text.choices[0].text
    assert choice.finish_reason == as_text.choices[0].finish_reason
    assert chat.usage is not None
    assert as_text.usage is not None
    assert chat.usage.prompt_tokens == as_text.usage.prompt_tokens


def test_a_chats_stream_has_the_role_first_and_the_reason_last(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30, "seed": 2, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert "timings" in (chunks[-1].model_extra or {})


def test_chat_logprobs_have_the_bytes_of_the_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 4, "logprobs": True}
    choice = client.chat.completions.create(**asked, top_logprobs=5, extra_body={"ignore_eos": True}).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 20
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert choice.message.content is not None
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    text = spelled.decode(errors="replace")
    for token in special:
        text = text.replace(token, "")
    assert text == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 5
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0]
    none = client.chat.completions.create(**asked).choices[0].logprobs
    assert none is not None
    assert none.content is not None
    assert all(token.top_logprobs == [] for token in none.content)


def test_content_may_be_parts_of_text_and_developers_are_systems(server: RunningServer) -> None:
    def prompt(messages: list[Any]) -> str:
        ids = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        return server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    plain = prompt([{"role": "system", "content": "one\ntwo"}])
    assert prompt([{"role": "developer", "content": parts}]) == plain
    assert plain == "<|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>assistant\n"


def test_fields_of_openai_that_change_no_text_are_accepted(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, user="me", store=False, metadata={"a": "b"}, tools=[],
        response_format={"type": "text"}, service_tier="auto", tool_choice="none", modalities=["text"],
    )  # fmt: skip
    answer = chat.choices[0].message.model_dump()
    more: list[Any] = [*MESSAGES, answer, {"role": "user", "content": "And water?"}]
    client.chat.completions.create(model=MODEL, messages=more, max_tokens=2)


# Errors

CHAT = {"messages": MESSAGES}
BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "between 0.0 and 2.0"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": True}, "temperature", "True"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 1.5}, "min_p", "between 0.0 and 1.0"),
    ({"presence_penalty": -2.5}, "presence_penalty", "between -2.0 and 2.0"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", "at least 1"),
    ({"max_tokens": 2.5}, "max_tokens", "integer"),
    ({"min_tokens": 20}, "min_tokens", "must not exceed max_tokens"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 129}, "n", "at most 128"),
    ({"best_of": 2, "n": 3}, "best_of", "at least n (3)"),
    ({"best_of": 2, "stream": True}, "best_of", "stream"),
    ({"logprobs": 6}, "logprobs", "at most 5"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "between 0 and 511"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "1 to 1000"),
    ({"stop_token_ids": [512]}, "stop_token_ids", "between 0 and 511"),
    ({"seed": 2**64}, "seed", "between"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"speculation": "magic"}, "speculation", "'off', 'ngram'"),
    ({"frequency": 1}, "frequency", "Unrecognized request argument supplied: frequency"),
    ({"prompt": {"text": "a"}}, "prompt", "list of token ids"),
    ({"prompt": []}, "prompt", "list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
    ({"prompt": [512]}, "prompt", "between 0 and 511"),
    ({"prompt": ["a"] * 300}, "prompt", "at most 272 sequences"),
    (CHAT | {"messages": []}, "messages", "at least 1"),
    (CHAT | {"messages": "hello"}, "messages", "list"),
    (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
    (CHAT | {"messages": [*MESSAGES, {"role": "poet", "content": "a"}]}, "messages[2].role", "'assistant'"),
    (CHAT | {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "tools"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "structured output"),
    (CHAT | {"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    (CHAT | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_400_and_says_why(
    client: openai.OpenAI, fields: dict[str, Any], param: str, message: str
) -> None:
    chat = "messages" in fields
    body = {"model": MODEL} | ({} if chat else {"prompt": PROMPT}) | fields
    with pytest.raises(openai.BadRequestError) as caught:
        # The client's own checks are not what is tested: it sends the body as it is.
        client.post("/chat/completions" if chat else "/completions", body=body, cast_to=object)
    error = caught.value
    assert error.status_code == 400
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert message in error.body["message"]


def test_a_prompt_longer_than_the_context_is_told_so(server: RunningServer) -> None:
    long = "é" * 4000
    for path, param, value in (
        ("/v1/completions", "prompt", [5] * 2048),
        ("/v1/completions", "prompt", long),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": long}]),
    ):
        response = server.http.post(path, json={"model": MODEL, param: value})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "2048 tokens" in error["message"]


def test_text_that_is_not_unicode_is_told_so(server: RunningServer) -> None:
    for content in (b'"prompt": "\\ud800"', b'"messages": [{"role": "user", "content": "\\ud800"}]'):
        path = "/v1/completions" if b"prompt" in content else "/v1/chat/completions"
        body = b'{"model": "llama", ' + content + b"}"
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == content[1:].partition(b'"')[0].decode()
        assert "Unicode" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"", "JSON object"), (b"[]", "JSON object"), (b"\xff", "body")]
)
def test_a_body_that_is_not_json_is_told_so(server: RunningServer, content: bytes, message: str) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_models_are_listed_and_others_not_found(server: RunningServer, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert (client.models.retrieve(MODEL).model_extra or {})["max_model_len"] == 2048
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="a"),
        lambda: client.chat.completions.create(model="gpt-4", messages=MESSAGES),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert f"'{MODEL}'" in caught.value.message


def test_urls_that_are_not_there_are_errors_of_the_same_kind(server: RunningServer) -> None:
    for response, status in (
        (server.http.get("/v1/nothing"), 404),
        (server.http.get("/v1/completions"), 405),
        (server.http.post("/v1/models"), 405),
    ):
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert response.headers["x-request-id"].startswith("req-")


# Everything else


def test_text_is_tokenized_and_comes_back(server: RunningServer) -> None:
    text = "Grüße, 世界 🐟"
    response = server.http.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert response["count"] == len(response["tokens"]) == len(response["token_strs"])
    assert response["max_model_len"] == 2048
    back = server.http.post("/detokenize", json={"model": MODEL, "tokens": response["tokens"]}).json()
    assert back == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, None),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ):
        response = server.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_every_response_has_a_request_id(client: openai.OpenAI) -> None:
    headers = {"x-request-id": "my-own"}
    raw = client.completions.with_raw_response.create(**FIXED, max_tokens=1, extra_headers=headers)
    assert raw.headers["x-request-id"] == "my-own"
    with client.completions.with_streaming_response.create(**FIXED, max_tokens=1, stream=True) as stream:
        assert stream.headers["x-request-id"].startswith("req-")


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
def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    aborted = server.metric('pilotfish_requests_total{outcome="abort"}')
    body = {"model": MODEL, "prompt": [7] * 300, "max_tokens": 1700, "ignore_eos": True, "stream": stream, "n": 2}
    body["speculation"] = "off"
    with httpx.Client(base_url=server.url) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                assert next(lines).startswith("data: ")
                assert server.metric("pilotfish_kv_blocks_used") >= 300 / 16
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)
    deadline = time.monotonic() + 3
    while server.metric("pilotfish_kv_blocks_used") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("pilotfish_sequences_running") == 0
    assert server.metric('pilotfish_requests_total{outcome="abort"}') == aborted + 2


def test_metrics_tell_of_what_was_done(server: RunningServer, client: openai.OpenAI) -> None:
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
    assert grown == [20, prompt_tokens, 1, 1, 1, 19, 1, timings["drafted_tokens"], timings["accepted_tokens"]]
    assert server.metric("pilotfish_kv_blocks_total") > 100
    for phase in ("plan", "draft", "forward", "sample", "commit"):
        name = f'pilotfish_step_phase_seconds_count{{phase="{phase}"}}'
        assert server.metric(name) == server.metric("pilotfish_engine_steps_total")


def test_the_api_process_holds_no_torch(server: RunningServer) -> None:
    libraries = [entry.path for entry in psutil.Process(server.process.pid).memory_maps()]
    assert libraries
    assert not [path for path in libraries if "torch" in path]
    assert [entry.path for entry in server.engine.memory_maps() if "torch" in entry.path]  # so they are to be seen


# Beginning and end: each with a server of its own


def test_loading_then_ready_then_an_engine_killed_in_mid_request(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(
        tmp_path / "log", "--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--api-key", "sesame",
        "--served-model-name", "fish", "--speculation", "none",
    )  # fmt: skip
    try:
        running.wait_for("/ready", 503)
        assert running.status("/health") == 200
        with running.client(api_key="sesame") as client:
            with pytest.raises(openai.InternalServerError) as loading:
                client.completions.create(model="fish", prompt="a")
            assert (loading.value.status_code, loading.value.code) == (503, "model_loading")
            assert int(loading.value.response.headers["retry-after"]) > 0
            running.wait_for("/ready", 200)
            with pytest.raises(openai.AuthenticationError) as refused, running.client(api_key="wrong") as stranger:
                stranger.completions.create(model="fish", prompt="a")
            assert refused.value.code == "invalid_api_key"
            assert running.status("/v1/models") == 401
            asked: dict[str, Any] = {
                "model": "fish",
                "prompt": "a",
                "max_tokens": 2000,
                "extra_body": {"ignore_eos": True},
            }
            stream = client.completions.create(**asked, stream=True)
            next(iter(stream))
            failed: list[Exception] = []

            def wait() -> None:
                try:
                    client.completions.create(**asked)
                except openai.InternalServerError as error:
                    failed.append(error)

            waiting = threading.Thread(target=wait)
            waiting.start()
            while running.metric("pilotfish_sequences_running") < 2:
                time.sleep(0.02)
            running.engine.kill()
            with pytest.raises(openai.APIError) as broken:
                list(stream)
            assert broken.value.code == "engine_dead"
            waiting.join(10)
            (error,) = failed
            assert isinstance(error, openai.InternalServerError)
            assert error.code == "engine_dead"
            assert running.status("/health") == 503
            assert running.status("/ready") == 503
            assert running.metric("pilotfish_kv_blocks_used") == 0
            with pytest.raises(openai.InternalServerError) as dead:
                client.completions.create(**asked)
            assert dead.value.status_code == 503
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(15) == 0
    finally:
        running.stop()


@pytest.mark.parametrize("allowed", [30.0, 0.5])
def test_sigterm_lets_answers_finish_for_a_while(tiny_llama: Path, tmp_path: Path, allowed: float) -> None:
    flags = ("--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--drain-timeout", str(allowed))
    running = RunningServer(tmp_path / "log", *flags)
    try:
        running.wait_for("/ready", 200)
        engine = running.engine
        length = 60 if allowed > 1 else 2000
        body = {"model": MODEL, "prompt": [9, 3], "max_tokens": length, "stream": True, "ignore_eos": True}
        body |= {"speculation": "off", "stream_options": {"include_usage": True}}
        with running.http.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=running.url) as other:
                while (answer := other.get("/ready")).status_code == 200:
                    time.sleep(0.01)
                assert answer.json()["status"] == "server_stopping"
                refused = other.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
                assert int(refused.headers["retry-after"]) > 0
            *_, last, done = lines
        assert done == "data: [DONE]"
        chunk = json.loads(last.removeprefix("data: "))
        if allowed > 1:
            assert chunk["usage"]["completion_tokens"] == length
        else:
            assert chunk["error"]["code"] == "server_stopping"
        assert running.process.wait(15) == 0
        assert not engine.is_running()
        assert "Traceback" not in running.log.read_text()
    finally:
        running.stop()


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(tmp_path / "log", "--model", str(tiny_llama), "--kv-cache-memory", "1KiB")
    try:
        assert running.process.wait(60) == 1
        said = running.log.read_text()
        assert "the engine could not start" in said
        assert "Traceback" not in said
    finally:
        running.stop()
