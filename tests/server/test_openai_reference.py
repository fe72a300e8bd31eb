"""The table of OpenAI's parameters in docs/http-api.md, held against the openai package's types and the server."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat

from pilotfish.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say

PAGE = (ROOT / "docs" / "http-api.md").read_text()
TABLE = re.search(r"## OpenAI's parameters\n.*?\n\n(\|.*?)\n\n", PAGE.replace("\n\n|", "\n\n|"), re.DOTALL)
STATES = {"works", "no effect", "refused"}
KINDS: dict[str, Any] = {"chat": chat, "completions": completions}

SAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}], "prompt": "a", "model": "tiny", "audio": {"voice": "alloy"},
    "best_of": 2, "echo": True, "frequency_penalty": 0.5, "function_call": {"name": "f"},
    "functions": [{"name": "f", "parameters": {}}], "logit_bias": {"5": 1}, "max_completion_tokens": 3, "max_tokens": 3,
    "metadata": {"a": "b"}, "modalities": ["text"], "moderation": {"mode": "on"}, "n": 2, "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "a"}, "presence_penalty": 0.5, "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h", "reasoning_effort": "high",
    "response_format": {"type": "json_object"}, "safety_identifier": "a", "seed": 1, "service_tier": "auto",
    "stop": "x", "store": True, "stream": True, "stream_options": {"include_usage": True}, "suffix": "a",
    "temperature": 0.5,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "top_p": 0.5,
    "top_logprobs": 2, "user": "a", "verbosity": "high", "web_search_options": {"search_context_size": "low"},
}  # fmt: skip
"""A value of each parameter that asks for something."""
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": SAMPLES["tools"]},
    "function_call": {"functions": SAMPLES["functions"]},
}


def rows() -> dict[str, dict[str, str]]:
    assert TABLE is not None
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE[1].splitlines()[2:]]
    return {
        name.strip("`"): {kind: state for kind, state in zip(KINDS, states, strict=True) if state} | {"why": why}
        for name, *states, why in cells
    }


def parameters(kind: str) -> set[str]:
    """The parameters that the installed openai package knows."""
    module = KINDS[kind]
    streaming = module.CompletionCreateParamsStreaming.__annotations__
    return {*module.CompletionCreateParamsBase.__annotations__, *streaming}


def logprobs(kind: str) -> Any:
    return True if kind == "chat" else 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_every_parameter_of_openais_package(kind: str) -> None:
    table = rows()
    assert {name for name, row in table.items() if kind in row} == parameters(kind)
    assert {row[kind] for row in table.values() if kind in row} == STATES
    for name, row in table.items():
        assert row.get(kind) != "refused" or row["why"], f"{name} is refused without a reason"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(parameters(kind))])
async def test_a_parameter_does_what_the_table_says(kind: str, name: str, tokenizer: Tokenizer) -> None:
    served = ScriptedApp(lambda request: say(request, [5]), tokenizer=tokenizer)
    served.engine.info = msgspec.structs.replace(INFO, max_model_len=512)  # room for tools
    required = {"model": "tiny"} | ({"messages": SAMPLES["messages"]} if kind == "chat" else {"prompt": "a"})
    value = logprobs(kind) if name == "logprobs" else SAMPLES[name]
    body = required | {name: value}
    if rows()[name][kind] != "refused":
        body |= BESIDE.get(name, {})
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    async with served.http:
        response = await served.http.post(path, json=body)
        if rows()[name][kind] == "refused":
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
        else:
            assert response.status_code == 200, response.text
            assert "warning" not in response.headers
        if name in ("messages", "prompt", "model"):
            return
        assert (await served.http.post(path, json=required | {name: None})).status_code == 200
