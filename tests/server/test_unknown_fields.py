"""Fields that a request type does not know: ignored with a warning, suggested, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import ApiError
from pilotfish.server.protocol.common import ApiModel
from pilotfish.server.protocol.completions import CompletionRequest
from pilotfish.server.protocol.foreign import FOREIGN, INERT
from pilotfish.server.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from pilotfish.server.protocol.unknown import unknown_fields
from pilotfish.server.routes import ENDPOINTS
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a"}
TYPES: list[type[ApiModel]] = [*(endpoint.request_type for endpoint in ENDPOINTS), TokenizeRequest, DetokenizeRequest]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(COMPLETION | fields)


@pytest.fixture
def served() -> ScriptedApp:
    return ScriptedApp(lambda request: say(request, [5]))


async def test_an_unknown_field_is_ignored_with_a_warning_in_header_and_log(
    served: ScriptedApp, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"include_usage": True, "flavour": 1}
    with caplog.at_level(logging.INFO):
        response = await served.complete(**{'frob"\\\né': 1, "quux": {"a": []}}, stream=True, stream_options=options)
        plain = await served.complete(nothing=None)
    assert (response.status_code, plain.status_code) == (200, 200)
    header = response.headers["warning"]
    assert header.startswith('299 - "unknown fields were ignored: frob\\"')
    assert header.endswith('quux, stream_options.flavour"')
    assert "warning" not in plain.headers
    levels = [
        (record.levelname, "quux" in str(record.__dict__))
        for record in caplog.records
        if record.name == "server.requests"
    ]
    assert levels == [("WARNING", True), ("INFO", False)]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_every_endpoint_warns(served: ScriptedApp, path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [5]}
    assert "frob" in (await served.http.post(path, json=body | {"frob": 1})).headers["warning"]
    assert (await served.http.post(path, json=body | {"modell": "tiny"})).status_code == 400


async def test_strict_requests_refuse_any_unknown_field() -> None:
    strict = ScriptedApp(lambda request: say(request, [5]), ServerConfig(strict_requests=True))
    response = await strict.complete(frob=1)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_parameter", "frob")
    assert (await strict.complete(mirostat=0)).status_code == 200  # known, and asks for nothing


@given(st.data())
def test_a_misspelling_is_refused_with_the_right_name(data: st.DataObject) -> None:
    """One letter is lost, doubled or exchanged with the next, or the name is in camelCase."""
    names = [name for name in CompletionRequest.model_fields if len(name) >= 5]
    name = data.draw(st.sampled_from(names))
    at = data.draw(st.integers(0, len(name) - 2))
    way = data.draw(st.sampled_from(["lost", "doubled", "exchanged", "camel"]))
    wrong = {
        "lost": name[:at] + name[at + 1 :],
        "doubled": name[: at + 1] + name[at:],
        "exchanged": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        "camel": "".join(word.title() for word in name.split("_")),
    }[way]
    known = {*CompletionRequest.model_fields, *FOREIGN, *INERT}
    if wrong in known or (way == "exchanged" and len(name) < 8):  # of short names little is left
        return
    with pytest.raises(ApiError, match="Did you mean") as caught:
        unknown_fields(completion(**{wrong: 1}), strict=False)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, wrong, "unknown_parameter")
    assert unknown_fields(completion(**{wrong: None}), strict=False) == ()


@pytest.mark.parametrize("type_", TYPES)
def test_no_name_of_another_server_is_taken_for_a_misspelling(type_: type[ApiModel]) -> None:
    for name in INERT - type_.model_fields.keys():
        fields: dict[str, Any] = {**dict.fromkeys(type_.model_fields), name: object()}
        body = type_.model_construct(None, **fields)
        assert unknown_fields(body, strict=False) == (name,)


@pytest.mark.parametrize("type_", TYPES)
def test_other_names_are_taken_for_themselves(type_: type[ApiModel]) -> None:
    names = ["conversation_id", "frequency", "language", "session", "tags", "thread_id", "title", "trace_id", "user_id"]
    fields: dict[str, Any] = {**dict.fromkeys(type_.model_fields), **dict.fromkeys(names, 1)}
    assert unknown_fields(type_.model_construct(None, **fields), strict=False) == tuple(names)


GENERATING: list[type[ApiModel]] = [endpoint.request_type for endpoint in ENDPOINTS]


@pytest.mark.parametrize("type_", GENERATING)
def test_what_alters_the_text_at_another_endpoint_is_never_ignored(type_: type[ApiModel]) -> None:
    """A field of one endpoint is a field of each other, or refused there, or known to alter no text."""
    names = {name for other in GENERATING for name in other.model_fields} - type_.model_fields.keys()
    assert names - type_.foreign.keys() - INERT == set()
    for name in names & type_.foreign.keys():
        if type_.foreign[name].always_neutral:
            continue
        body = type_.model_construct(None, **{**dict.fromkeys(type_.model_fields), name: object()})
        with pytest.raises(ApiError) as caught:
            unknown_fields(body, strict=False)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert INERT.isdisjoint(type_.foreign)


@pytest.mark.parametrize("name", sorted(FOREIGN.keys() - CompletionRequest.model_fields.keys()))
def test_what_would_alter_the_text_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    foreign = FOREIGN[name]
    for value in (None, *foreign.neutral):
        assert unknown_fields(completion(**{name: value}), strict=False) == ()
    for value in (0.37, 7, "a", [1], {"a": 1}):
        if foreign.always_neutral:
            assert unknown_fields(completion(**{name: value}), strict=True) == ()
            continue
        with pytest.raises(ApiError) as caught:
            unknown_fields(completion(**{name: value}), strict=False)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_true_is_not_the_number_one() -> None:
    for fields in ({"use_beam_search": True}, {"tfs_z": True}, {"early_stopping": 1}):
        with pytest.raises(ApiError):
            unknown_fields(completion(**fields), strict=False)
    assert unknown_fields(completion(tfs_z=1, length_penalty=1.0, top_n_sigma=-1.0), strict=False) == ()


def test_thousands_of_unknown_fields_are_refused() -> None:
    with pytest.raises(ApiError, match="more than 64"):
        unknown_fields(completion(**{f"x{i}": 1 for i in range(5000)}), strict=False)


@pytest.mark.parametrize("type_", TYPES)
async def test_null_stands_for_every_fields_default(type_: type[ApiModel]) -> None:
    base: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "prompt": "a",
        "tokens": [1],
        "input": "a",
    }
    base |= {"max_tokens": 1} if type_.model_fields.get("max_tokens") else {}
    required = {name for name, field in type_.model_fields.items() if field.is_required()}
    optional = type_.model_fields.keys() - required
    type_.model_validate({name: base[name] for name in required} | dict.fromkeys(optional))


async def test_keys_that_clients_add_to_messages_are_ignored(served: ScriptedApp) -> None:
    added = {
        "id": 1947, "opts": {"visible": False}, "timestamp": 1.5, "parsed": None, "refusal": None, "annotations": [],
        "reasoning_content": None, "reasoning": None, "thinking": None, "tool_call_id": None, "prefix": False,
        "cache_control": {"type": "ephemeral"}, "weight": 1, "images": None,
    }  # fmt: skip
    messages = [{"role": role, "content": "a", **added} for role in ("system", "user", "assistant", "user")]
    response = await served.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert response.status_code == 200, response.text
    assert "warning" not in response.headers
    plain = [{"role": message["role"], "content": "a"} for message in messages]
    await served.http.post("/v1/chat/completions", json={"model": "tiny", "messages": plain})
    assert served.engine.requests[0].prompt_ids == served.engine.requests[1].prompt_ids


ASK_FOR_NOTHING: list[dict[str, Any]] = [
    {"foo": None}, {"best_of": 1}, {"use_beam_search": False}, {"add_generation_prompt": True},
    {"continue_final_message": False}, {"allowed_token_ids": None}, {"bad_words": []}, {"priority": 0},
    {"length_penalty": 1.0}, {"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}, {"moderation": None},
    {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}, {"prompt_cache_options": None},
    {"repeat_penalty": 1.1}, {"skip_special_tokens": None}, {"include_stop_str_in_output": None},
    {"verbosity": "medium"}, {"reasoning_effort": "none"}, {"tools": []},
    {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": False}},
]  # fmt: skip


@pytest.mark.parametrize("fields", ASK_FOR_NOTHING, ids=str)
async def test_what_asks_for_nothing_or_for_what_is_done_anyway_is_accepted(
    served: ScriptedApp, fields: dict[str, Any]
) -> None:
    response = await served.chat(**fields)
    assert response.status_code == 200, response.text


async def test_repeat_penalty_is_repetition_penalty(served: ScriptedApp) -> None:
    await served.complete(repeat_penalty=1.3)
    assert served.engine.requests[0].params.repetition_penalty == 1.3
    assert (await served.complete(repeat_penalty=1.3, repetition_penalty=1.3)).status_code == 200
    assert (await served.complete(repeat_penalty=1.3, repetition_penalty=1.2)).status_code == 400
    error = (await served.complete(repeat_penalty=-1)).json()["error"]
    assert error["param"] == "repeat_penalty"
    assert error["message"].startswith("repeat_penalty is -1")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_value"),
        ({}, "missing_required_parameter"),
        ({"prompt": None, "messages": None}, "missing_required_parameter"),
    ],
)
async def test_tokenize_takes_a_prompt_or_messages(served: ScriptedApp, body: dict[str, Any], code: str) -> None:
    response = await served.http.post("/tokenize", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, "prompt")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "model": "tiny", "\\ud800": 1}',
        b'{"prompt": "a", "model": "tiny", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "a", "model": "tiny", "stream_options": {"\\ud800": 1}, "stream": true}',
        b'{"prompt": "a", "model": "tiny", "max_tokens": ' + b"9" * 4000 + b', "top_k": ' + b"9" * 4000 + b"}",
        *(
            b'{"prompt": "a", "model": "tiny", "%b": %b%b}' % (name, sign, b"9" * 4000)
            for name in (
                b"temperature",
                b"seed",
                b"n",
                b"best_of",
                b"min_tokens",
                b"logprobs",
                b"min_p",
                b"stop",
                b"user",
            )
            for sign in (b"", b"-")
        ),
        b'{"prompt": "a", "model": "tiny", "stop_token_ids": [' + b"9" * 4000 + b"]}",
        b'{"model": "tiny", "prompt": [' + b"9" * 4000 + b"]}",
        b'{"prompt": "a", "model": "tiny", "temperature": NaN, "top_p": Infinity, "logit_bias": {"5": NaN}}',
    ],
    ids=lambda body: body[:60].decode(),
)
async def test_an_extreme_value_is_never_an_internal_error_and_never_quoted_whole(
    served: ScriptedApp, body: bytes
) -> None:
    response = await served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["param"], error
        assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, "model is null, but must be a string"),
        ("stream", 1, "stream is 1, but must be true or false"),
        ("max_tokens", 1.5, "max_tokens is 1.5, but must be an integer"),
        ("temperature", "0.7", "temperature is '0.7', but must be a number"),
        ("stop_token_ids", {}, "stop_token_ids is {}, but must be a list"),
        ("metadata", [], "metadata is [], but must be an object"),
        ("stream_options", "x", "stream_options is 'x', but must be an object"),
    ],
)
async def test_a_wrong_type_is_told_in_the_words_of_json(
    served: ScriptedApp, name: str, value: Any, message: str
) -> None:
    error = (await served.complete(**{name: value})).json()["error"]
    assert (error["message"], error["param"], error["code"]) == (message, name, "invalid_type")


@pytest.mark.parametrize("slash", ["", "/"])
async def test_models_are_listed_with_and_without_a_slash(served: ScriptedApp, slash: str) -> None:
    response = await served.http.get(f"/v1/models{slash}")
    assert response.json()["data"][0]["id"] == "tiny"
