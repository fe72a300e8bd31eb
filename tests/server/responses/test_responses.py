"""The Responses API: items, events and the store, held against the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from pilotfish.engine.request import Delta, Request
from pilotfish.server.config import ServerConfig
from pilotfish.server.responses.store import ResponseStore
from pilotfish.text.tokenizer import Tokenizer
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
THOUGHT = f"<think>Which city?</think>\n\nLet me look. <tool_call>\n{CALL}\n</tool_call>"
DELTAS = tuple(f"response.{name}.delta" for name in ("output_text", "reasoning_text", "function_call_arguments"))


@pytest.fixture
def saying(tokenizer: Tokenizer) -> Callable[..., ScriptedApp]:
    def made(text: str, portion: int = 3, finish: Any = "stop", **settings: Any) -> ScriptedApp:
        ids = tokenizer.encode(text, add_special_tokens=False)

        def script(request: Request) -> Sequence[Delta]:
            *first, last = say(request, *[ids[i : i + portion] for i in range(0, len(ids), portion)])
            return [*first, msgspec.structs.replace(last, finish_reason=finish)]

        served = ScriptedApp(script, ServerConfig(reasoning_parser="think", **settings), tokenizer=tokenizer)
        served.engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
        return served

    return made


async def ask(served: ScriptedApp, **body: Any) -> Any:
    response = await served.http.post("/v1/responses", json={"model": "tiny", "input": "hi", **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    Response.model_validate(answer, strict=True)
    return answer


async def events(served: ScriptedApp, **body: Any) -> list[Any]:
    asked = {"model": "tiny", "input": "hi", "stream": True, **body}
    response = await served.http.post("/v1/responses", json=asked)
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        parsed = EVENT.validate_python(event)
        assert type(parsed).__name__.startswith("Response")
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(response: Any) -> Any:
    """A response without what differs between two of them."""
    left_out = ("id", "created_at", "completed_at", "timings", "call_id")
    if isinstance(response, dict):
        return {key: plain(value) for key, value in response.items() if key not in left_out}
    return [plain(each) for each in response] if isinstance(response, list) else response


@pytest.mark.parametrize("portion", [1, 4, 1000])
async def test_a_stream_adds_up_to_the_response(saying: Callable[..., ScriptedApp], portion: int) -> None:
    served = saying(THOUGHT, portion)
    async with served.http:
        whole = await ask(served, tools=[TOOL])
        stream = await events(served, tools=[TOOL])
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    reasoning, message, call = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Which city?"}]
    assert message["content"][0]["text"] == "Let me look."
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
    assert {item["status"] for item in whole["output"]} == {"completed"}
    kinds = [event["type"] for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert plain(stream[-1]["response"]) == plain(whole)
    built: dict[int, str] = {}
    for event in stream:
        if event["type"] in DELTAS:
            built[event["output_index"]] = built.get(event["output_index"], "") + event["delta"]
        elif event["type"] == "response.output_item.done":
            assert event["item"] == stream[-1]["response"]["output"][event["output_index"]]
    assert built == {0: "Which city?", 1: "Let me look.", 2: call["arguments"]}


async def test_an_answer_that_is_cut_off_is_incomplete(saying: Callable[..., ScriptedApp]) -> None:
    served = saying("once upon a time", finish="length")
    async with served.http:
        whole = await ask(served)
        stream = await events(served)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert stream[-1]["type"] == "response.incomplete"


async def test_a_response_is_kept_and_gone_on_with(saying: Callable[..., ScriptedApp], tokenizer: Tokenizer) -> None:
    served = saying("blue whales")
    async with served.http:
        first = await ask(served, input="my name is Ada", instructions="Be brief.")
        second = await ask(served, input="who am I?", previous_response_id=first["id"])
        third = await ask(
            served,
            input=[{"role": "user", "content": "more"}],
            previous_response_id=second["id"],
            instructions="Shout.",
        )
        got = await served.http.get(f"/v1/responses/{third['id']}")
        assert got.json() == third
        items = await served.http.get(f"/v1/responses/{third['id']}/input_items")
        ResponseItemList.model_validate(items.json())
        assert [item["content"][0]["text"] for item in items.json()["data"]] == ["more"]
        deleted = await served.http.delete(f"/v1/responses/{third['id']}")
        assert deleted.json() == {"id": third["id"], "object": "response", "deleted": True}
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
            gone = await served.http.request(method, f"/v1/responses/{third['id']}{path}")
            assert gone.status_code == 404
            assert "replicas" in gone.json()["error"]["message"]
        missing = await served.http.post(
            "/v1/responses", json={"model": "tiny", "input": "a", "previous_response_id": third["id"]}
        )
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "previous_response_id")
    prompts = [tokenizer.decode(request.prompt_ids, skip_special_tokens=False) for request in served.engine.requests]
    assert "Be brief." in prompts[0]
    assert "Be brief." not in prompts[1]  # instructions are not carried over
    for text in ("Ada", "blue whales", "who am I?", "more", "Shout."):
        assert text in prompts[2]


async def test_what_is_not_to_be_stored_is_not(saying: Callable[..., ScriptedApp]) -> None:
    for served, body in ((saying("a"), {"store": False}), (saying("a", response_store_size=0), {})):
        async with served.http:
            response = await ask(served, **body)
            assert response["store"] is False
            assert (await served.http.get(f"/v1/responses/{response['id']}")).status_code == 404


async def test_tenants_do_not_see_each_others_responses(saying: Callable[..., ScriptedApp]) -> None:
    served = saying("a", api_key=("ada=k1", "bob=k2"))
    async with served.http:
        served.http.headers["authorization"] = "Bearer k1"
        response = await ask(served)
        served.http.headers["authorization"] = "Bearer k2"
        assert (await served.http.get(f"/v1/responses/{response['id']}")).status_code == 404
        assert (await served.http.delete(f"/v1/responses/{response['id']}")).status_code == 404
        served.http.headers["authorization"] = "Bearer k1"
        assert (await served.http.get(f"/v1/responses/{response['id']}")).status_code == 200


async def test_a_history_of_calls(saying: Callable[..., ScriptedApp], tokenizer: Tokenizer) -> None:
    served = saying("warm")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "7 degrees"},
    ]
    async with served.http:
        await ask(served, input=items, tools=[TOOL])
    prompt = tokenizer.decode(served.engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt.index("Weather?") < prompt.index('"city": "Oslo"}') < prompt.index("7 degrees")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "strict": True, "parameters": {"type": "thing"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "thing"}}}},
            "text.format.schema.type",
        ),
        ({"background": True}, "background"),
        ({"user": "\ud800"}, "user"),
        ({"previous_response_id": "\ud800"}, "previous_response_id"),
        ({"metadata": {"\ud800": "a"}}, "metadata"),
        ({"reasoning": {"summary": ["\ud800"]}}, "reasoning"),
        ({"text": {"format": {"type": "text", "a": "\ud800"}}}, "text"),
        ({"input": [{"role": "user", "content": "a", "b": {"\ud800": 1}}]}, "input"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["all"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temprature": 1}, "temprature"),
    ],
)
async def test_errors_name_their_place(saying: Callable[..., ScriptedApp], body: dict[str, Any], param: str) -> None:
    served = saying("a")
    async with served.http:
        content, headers = json.dumps({"model": "tiny", "input": "hi"} | body), {"content-type": "application/json"}
        response = await served.http.post("/v1/responses", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_the_store_is_bounded_in_number_and_age(tmp_path: Path) -> None:
    class Tiny(msgspec.Struct):
        id: str
        output: list[Any] = []

    store = ResponseStore(str(tmp_path / "store"), size=3, age=3600)
    for i in range(5):
        store.put("", Tiny(f"r{i}"), [], 0)
    assert [bool(await store.get("", f"r{i}")) for i in range(5)] == [False, False, True, True, True]
    store.close()
    again = ResponseStore(str(tmp_path / "store"), size=3, age=3600)
    assert await again.get("", "r4")
    again.close()
    aged = ResponseStore(str(tmp_path / "store"), size=3, age=1e-9)
    assert await aged.get("", "r4") is None
    aged.close()


async def test_the_store_is_bounded_in_bytes(tmp_path: Path) -> None:
    class Tiny(msgspec.Struct):
        id: str
        output: list[Any] = []

    store = ResponseStore(str(tmp_path / "store"), size=100, age=3600, most=10_000)
    for i in range(5):
        store.put("", Tiny(f"r{i}"), [{"text": "x" * 3000}], 0)
    assert [bool(await store.get("", f"r{i}")) for i in range(5)] == [False, False, True, True, True]
    store.put("", Tiny("large"), [{"text": "x" * 20_000}], 0)
    assert await store.get("", "large") is None
    store.close()


async def test_a_broken_store_takes_nothing_down(saying: Callable[..., ScriptedApp], tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(b"this is no database" * 1000)
    served = saying("a", response_store=str(path))
    async with served.http:
        response = await ask(served)
        assert (await served.http.get(f"/v1/responses/{response['id']}")).status_code == 404


@pytest.mark.process
@pytest.mark.xdist_group("http")
def test_openais_client_on_a_real_server(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    response = client.responses.create(model=model, input="hi", max_output_tokens=8)
    assert response.status == "incomplete"
    assert response.output_text
    with client.responses.stream(model=model, input="hi", max_output_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    plain = client.responses.create(model=model, input="hi", max_output_tokens=8, temperature=0)
    assert plain.output_text == text
    tools: Any = [{**TOOL, "strict": True}]
    called = client.responses.create(
        model=model,
        input="hi",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=900,
        extra_body={"seed": 3},
    )
    assert called.output[-1].type == "function_call"
    assert client.responses.retrieve(response.id).output_text == response.output_text
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
