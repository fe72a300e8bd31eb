"""Reasoning on a real engine with a template like Qwen 3's: its budget, what comes after it, and how it is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.running_server import RunningServer
from tests.support.templates import QWEN3

pytestmark = pytest.mark.process

OPENED = "{%- if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}{% endif %}"
"""As the template of Qwen 3's thinking models has it: the prompt opens the reasoning."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["a"]}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA, "strict": True}}}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "sampled": {"temperature": 1.0, "seed": 7}}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("thinking")
    shutil.copytree(tiny_llama, folder / "thinker")
    at = QWEN3.rindex("{%- if enable_thinking is defined")
    (folder / "thinker" / "chat_template.jinja").write_text(f"{QWEN3[:at]}{OPENED}{QWEN3[at:]}")
    flags = ["--kv-cache-memory", "16MiB", "--max-num-seqs", "8", "--log-level", "warning", "--suffix-memory", "0"]
    running = RunningServer(folder / "log", "--model", str(folder / "thinker"), *flags)
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


def post(server: RunningServer, path: str, **body: Any) -> Any:
    response = server.http.post(path, json={"model": "thinker", **body})
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: RunningServer, **body: Any) -> Any:
    return post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi."}], **body)


def thought(answer: Any) -> int:
    count: int = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    return count


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("budget", [0, 1, 9])
def test_the_budget_is_kept_and_then_the_form(server: RunningServer, budget: int, sampling: str) -> None:
    """A random model does not close its reasoning by itself: the engine does, in the step that uses up the budget."""
    found = []
    for speculation in ("off", "auto", "grammar", "ngram"):
        asked = {"thinking_budget": budget, "max_tokens": 150, "speculation": speculation} | SAMPLING[sampling]
        answer = chat(server, **FORM, **asked)
        (choice,) = answer["choices"]
        assert thought(answer) == budget
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert ("reasoning" in choice["message"]) == bool(choice["message"].get("reasoning", "").strip())
        found.append((choice["message"], answer["usage"]["completion_tokens"]))
    assert found == [found[0]] * len(found)


@pytest.mark.parametrize("budget", [0, 5])
def test_calls_after_the_budget(server: RunningServer, budget: int) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]
    asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    found = []
    for speculation in ("off", "auto"):
        answer = chat(server, **asked, thinking_budget=budget, speculation=speculation, max_tokens=200)
        (choice,) = answer["choices"]
        assert (thought(answer), choice["finish_reason"]) == (budget, "tool_calls")
        (call,) = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        found.append((choice["message"].get("reasoning"), call["function"]))
    assert found[0] == found[1]


def test_all_of_it_is_reasoning_until_it_is_closed(server: RunningServer) -> None:
    """Cut by max_tokens, or by a stop string within the reasoning."""
    cut = chat(server, temperature=0, max_tokens=12)
    assert (thought(cut), cut["choices"][0]["finish_reason"]) == (12, "length")
    reasoning = cut["choices"][0]["message"]["reasoning"]
    stopped = chat(server, temperature=0, max_tokens=12, stop=reasoning[-2:])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert thought(stopped) == stopped["usage"]["completion_tokens"] <= 12


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "minimal"}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_reasoning_turned_off(server: RunningServer, fields: Any) -> None:
    answer = chat(server, temperature=0, max_tokens=8, thinking_budget=4, **fields)
    assert thought(answer) == 0
    assert "reasoning" not in answer["choices"][0]["message"]


def test_every_chunk_counts(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"messages": [{"role": "user", "content": "Hi."}], "thinking_budget": 5, "max_tokens": 20, "temperature": 0}
    body = {"model": "thinker", **asked, "stream": True, "stream_options": options}
    lines = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    counts = [thought(chunk) for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5 == thought(chat(server, **{key: asked[key] for key in asked if key != "messages"}))
    assert all(thought(each) <= each["usage"]["completion_tokens"] for each in chunks)


def test_all_three_count_alike(server: RunningServer) -> None:
    own = chat(server, temperature=0, max_tokens=20, thinking_budget=6)
    asked = {"temperature": 0, "thinking_budget": 6, "input": "Hi.", "max_output_tokens": 20}
    items = post(server, "/v1/responses", **asked)
    thinking = {"type": "enabled", "budget_tokens": 6}
    messages = [{"role": "user", "content": "Hi."}]
    message = post(server, "/v1/messages", messages=messages, max_tokens=20, temperature=0, thinking=thinking)
    assert items["usage"]["output_tokens_details"]["reasoning_tokens"] == thought(own) == 6
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 6
    counts = [own["usage"]["completion_tokens"], items["usage"]["output_tokens"], message["usage"]["output_tokens"]]
    assert counts == [counts[0]] * 3
    reasoning = own["choices"][0]["message"]["reasoning"]
    assert [item["content"][0]["text"] for item in items["output"] if item["type"] == "reasoning"] == [reasoning]
    assert message["content"][0]["thinking"] == reasoning
