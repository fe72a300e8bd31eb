"""`include_provenance`: of each token, the drafter that proposed it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from pilotfish.engine.request import Delta, Request
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

OWN = {"drafter": None, "position": None}
EXPECTED = [
    {"token": " word5"} | OWN,
    {"token": " word6", "drafter": "ngram", "position": 1},
    {"token": " word7", "drafter": "ngram", "position": 2},
    {"token": " word8"}
    | OWN
    | {"rejected": 2, "rejected_tokens": [" word100", " word101"], "rejected_drafter": "ngram"},
]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def script(request: Request) -> Sequence[Delta]:
    return say(request, [5], [6, 7, 8], drafted=4, accepted=2)


async def post(path: str, **fields: Any) -> str:
    body = {"model": "tiny", "max_tokens": 4} | PATHS[path] | fields
    response = await ScriptedApp(script).http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.text


@pytest.mark.parametrize("path", PATHS)
async def test_each_token_has_its_drafter_and_its_position(path: str) -> None:
    (choice,) = json.loads(await post(path, include_provenance=True))["choices"]
    assert choice["provenance"] == EXPECTED


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_has_those_of_the_tokens_that_begin_in_each_chunk(path: str, logprobs: int | None) -> None:
    fields = {"logprobs": bool(logprobs) if "chat" in path else logprobs}
    text = await post(path, include_provenance=True, stream=True, **fields)
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    parts = [choice.get("provenance", []) for choice in choices]
    assert [origin for part in parts for origin in part] == EXPECTED
    assert [len(part) for part in parts if part] == [1, 3]
    shown = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    for spelled, part in zip(shown, parts, strict=True):
        assert spelled == "".join(origin["token"] for origin in part)
    if logprobs:
        assert sum(bool(choice["logprobs"]) for choice in choices) >= 2


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_is_said_unasked_and_the_text_is_the_same(path: str) -> None:
    plain, asked = [json.loads(await post(path, **fields)) for fields in ({}, {"include_provenance": True})]
    assert "provenance" not in plain["choices"][0]
    del asked["choices"][0]["provenance"]
    assert plain["choices"] == asked["choices"]


@pytest.mark.parametrize("path", PATHS)
async def test_what_a_stop_string_cuts_off_has_no_object(path: str) -> None:
    (choice,) = json.loads(await post(path, include_provenance=True, stop="word7"))["choices"]
    # " word7" begins with a space, which is shown.
    assert choice["provenance"] == EXPECTED[:3]


@pytest.mark.parametrize("path", PATHS)
async def test_an_echoed_prompt_has_no_objects(path: str) -> None:
    fields = {"echo": True, "logprobs": 0} if path == "/v1/completions" else {}
    (choice,) = json.loads(await post(path, include_provenance=True, **fields))["choices"]
    assert choice["provenance"] == EXPECTED
