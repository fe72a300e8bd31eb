"""Errors of a real server with OpenAI's client: status, parameter, and what is expected."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.running_server import MESSAGES, MODEL, PROMPT, RunningServer

pytestmark = pytest.mark.process

CHAT = {"messages": MESSAGES}
BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "between 0.0 and 2.0"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": True}, "temperature", "True"),
    ({"top_p": -0.1}, "top_p", "between 0.0 and 1.0"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 1.5}, "min_p", "between 0.0 and 1.0"),
    ({"presence_penalty": -2.5}, "presence_penalty", "between -2.0 and 2.0"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -2}, "max_tokens", "at least 1"),
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
    ({"logit_bias": {"١": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 10**400}}, "logit_bias", "too large"),
    ({"min_tokens": 10**400}, "min_tokens", "must not exceed max_tokens"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "1 to 1000"),
    ({"stop_token_ids": [512]}, "stop_token_ids", "between 0 and 511"),
    ({"seed": 2**64}, "seed", "between"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"speculation": "magic"}, "speculation", "'auto', 'off', 'ngram', 'suffix', 'suffix-memory', 'prediction'"),
    ({"temprature": 1}, "temprature", "Did you mean temperature?"),
    ({"mirostat": 2}, "mirostat", "not supported"),
    ({"prompt": {"text": "a"}}, "prompt", "list of token ids"),
    ({"prompt": []}, "prompt", "list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
    ({"prompt": [512]}, "prompt", "between 0 and 511"),
    ({"prompt": ["a"] * 5000}, "prompt", "at most 4096"),
    (CHAT | {"messages": []}, "messages", "is empty, but must have at least 1 item"),
    (CHAT | {"messages": "hello"}, "messages", "list"),
    (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
    (CHAT | {"messages": [*MESSAGES, {"role": "poet", "content": "a"}]}, "messages[2].role", "'assistant'"),
    (CHAT | {"messages": [{"role": "tool", "content": None}]}, "messages[0].content", "Missing"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
    (CHAT | {"tools": [{"type": "web_search"}]}, "tools[0].type", "only tools of type 'function'"),
    (CHAT | {"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    (CHAT | {"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    (CHAT | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
    (CHAT | {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "'self'"),
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


def test_a_prompt_longer_than_the_context_is_refused_with_the_reason(server: RunningServer) -> None:
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


def test_text_that_is_not_unicode_is_refused_with_the_reason(server: RunningServer) -> None:
    for content in (b'"prompt": "\\ud800"', b'"messages": [{"role": "user", "content": "\\ud800"}]'):
        path = "/v1/completions" if b"prompt" in content else "/v1/chat/completions"
        body = b'{"model": "llama", ' + content + b"}"
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == content[1:].partition(b'"')[0].decode()
        assert "Unicode" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"\xff", "not UTF-8"),
        (b"[" * 3000, "nested too deeply"),
        (b"1" * 5000, "thousands of digits"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_the_reason(
    server: RunningServer, content: bytes, message: str
) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert error["code"] == ("invalid_json" if "JSON object" not in message else None)


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


def test_unknown_urls_have_errors_of_the_same_form(server: RunningServer) -> None:
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
