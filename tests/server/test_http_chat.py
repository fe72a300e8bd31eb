"""/v1/chat/completions, models and tokenization on a real server with a real engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.running_server import FIXED, MESSAGES, MODEL, RunningServer

pytestmark = pytest.mark.process


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


def test_text_is_tokenized_and_comes_back(server: RunningServer) -> None:
    text = "Grüße, 世界 🐟"
    response = server.http.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert response["count"] == len(response["tokens"]) == len(response["token_strs"])
    assert response["max_model_len"] == 2048
    back = server.http.post("/detokenize", json={"model": MODEL, "tokens": response["tokens"]}).json()
    assert back == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
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
