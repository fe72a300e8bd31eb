"""Predicted Outputs with OpenAI's client, on real servers with and without the controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.running_server import MESSAGES, MODEL, PROMPT, RunningServer

pytestmark = pytest.mark.process

JSON = {"content-type": "application/json"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "seed": 11, "temperature": 0.7}


@pytest.fixture(scope="module", params=["--adaptive-drafts", "--no-adaptive-drafts"])
def any_client(
    request: pytest.FixtureRequest, server: RunningServer, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """On a server with the controller (the shared one), and on one without."""
    running = server
    if request.param == "--no-adaptive-drafts":
        log = tmp_path_factory.mktemp("server") / "log"
        running = RunningServer(log, "--model", str(tiny_llama), "--kv-cache-memory", "16MiB", request.param)
    try:
        running.wait_for("/ready", 200)
        with running.client() as made:
            yield made
    finally:
        if running is not server:
            running.stop()


def content(text: Any) -> dict[str, Any]:
    return {"type": "content", "content": text}


def predicted(usage: openai.types.CompletionUsage | None) -> tuple[int, int]:
    assert usage is not None
    details = usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["right", "parts", "half right", "empty", "no parts", "longer", "unrelated"])
def test_chat(kind: str, stream: bool, any_client: openai.OpenAI) -> None:
    whole = {"ignore_eos": True}
    plain = any_client.chat.completions.create(**CHAT, extra_body=whole | {"speculation": "off"})
    text = plain.choices[0].message.content
    assert text
    assert predicted(plain.usage) == (0, 0)
    prediction: Any = {
        "right": text,
        "parts": [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}],
        "half right": text[: len(text) // 2] + " something else",
        "empty": "",
        "no parts": [],
        "longer": text + " and so on" * 100,
        "unrelated": "0123456789" * 5,
    }[kind]
    asked: dict[str, Any] = {**CHAT, "prediction": content(prediction), "extra_body": whole}
    if stream:
        chunks = list(any_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage, extra = chunks[-1].usage, chunks[-1].model_extra
    else:
        completion = any_client.chat.completions.create(**asked)
        said, usage, extra = completion.choices[0].message.content or "", completion.usage, completion.model_extra
    assert said == text
    assert usage is not None
    assert usage.completion_tokens == 40
    accepted, rejected = predicted(usage)
    timings = (extra or {})["timings"]
    assert accepted <= timings["accepted_tokens"] <= timings["drafted_tokens"]
    assert accepted + rejected <= timings["drafted_tokens"]
    if kind in ("empty", "no parts"):
        assert (accepted, rejected) == (0, 0)


def test_tokens_of_a_prediction_are_counted(any_client: openai.OpenAI) -> None:
    """A text that the tokenizer spells as the model does: one character again and again."""
    body: dict[str, Any] = {"ignore_eos": True, "logit_bias": {"40": 100}, "speculation": "off"}
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    plain = any_client.completions.create(**asked, extra_body=body)
    text = plain.choices[0].text
    right = any_client.completions.create(**asked, extra_body=body | {"speculation": None, "prediction": content(text)})
    assert right.choices[0].text == text
    accepted, rejected = predicted(right.usage)
    timings = (right.model_extra or {})["timings"]
    assert accepted > 0
    assert accepted + rejected <= timings["drafted_tokens"]
    named = any_client.completions.create(
        **asked, extra_body=body | {"speculation": "ngram", "prediction": content(text)}
    )
    assert named.choices[0].text == text
    assert predicted(named.usage) == (0, 0)
    assert (named.model_extra or {})["timings"]["drafter"] == "ngram"


@pytest.mark.parametrize(
    ("prediction", "says"),
    [
        ("text", '"type": "content"'),
        ({"type": "content"}, '"type": "content"'),
        ({"type": "text", "content": "a"}, "has type 'text', but it must be 'content'"),
        ({"type": "content", "content": 5}, "a string or a list of text parts"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "not a text part"),
        ({"type": "content", "content": "a", "more": 1}, '"type": "content"'),
        (content("\ud800"), "not valid Unicode"),
    ],
)
def test_a_wrong_prediction_is_refused(prediction: Any, says: str, server: RunningServer) -> None:
    for path, body in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": PROMPT})):
        asked = {"model": MODEL, "prediction": prediction, **body}
        response = server.http.post(f"/v1/{path}", content=json.dumps(asked), headers=JSON)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "prediction")
        assert says in error["message"]


def test_a_prediction_is_for_one_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="asks for 2") as raised:
        client.chat.completions.create(**CHAT | {"n": 2, "prediction": content("a")})
    assert raised.value.param == "prediction"
    for more in ({"n": 3}, {"best_of": 2}, {"prompt": ["a", "b"]}):
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, **more}
        with pytest.raises(openai.BadRequestError, match="prediction is only allowed with a single answer"):
            client.completions.create(**asked, extra_body={"prediction": content("a")})
