"""gpt-oss's format through the server: a tokenizer with its tokens, a template like its own, a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.request import Delta, Request
from pilotfish.server.config import ServerConfig
from pilotfish.text.formats.harmony import CALL, MARKERS, RETURN
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say
from tests.support.templates import HARMONY
from tests.support.tiny import train_tokenizer

TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather"}}]
THOUGHT = "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant"
CALLED = f'{THOUGHT}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{{"city": "Oslo"}}<|call|>'
SAID = f"{THOUGHT}<|channel|>final<|message|>It is 7 degrees.<|return|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    inner = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token="<|im_end|>",
        chat_template=HARMONY,
        additional_special_tokens=list(MARKERS),
    )
    folder = tmp_path_factory.mktemp("harmony")
    inner.save_pretrained(folder)
    return load_tokenizer(ModelFiles("tiny", "huggingface", folder))


def served(tokenizer: Tokenizer, text: str, portion: int) -> ScriptedApp:
    ids = tokenizer.encode(text, add_special_tokens=False)

    def script(request: Request) -> list[Delta]:
        *first, last = say(request, *[ids[i : i + portion] for i in range(0, len(ids), portion)])
        end = last.token_ids[-1]
        stop = end if end in request.params.stop_token_ids else None
        return [*first, msgspec.structs.replace(last, finish_reason="stop", stop_token=stop)]

    app = ScriptedApp(script, ServerConfig(), tokenizer=tokenizer)
    app.engine.info = msgspec.structs.replace(INFO, max_model_len=2000, vocab_size=tokenizer.vocab_size)
    return app


@pytest.mark.parametrize("portion", [1, 3, 1000])
async def test_channels(tokenizer: Tokenizer, portion: int) -> None:
    app = served(tokenizer, SAID, portion)
    async with app.http:
        answer = (await app.chat(reasoning_effort="minimal", thinking_budget=9)).json()
        response = await app.http.post("/v1/responses", json={"model": "tiny", "input": "a"})
        assert response.status_code == 200, response.text
        items = response.json()["output"]
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Which city?", "It is 7 degrees.")
    thought = len(tokenizer.encode("Which city?", add_special_tokens=False))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought
    assert [item["type"] for item in items] == ["reasoning", "message"]
    request = app.engine.requests[0]
    assert [tokenizer.token(id_) for id_ in request.params.stop_token_ids] == [CALL, RETURN]
    thinking = request.params.thinking
    assert thinking is not None
    assert thinking.begin == thinking.again != ()
    prompt = tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert "Reasoning: low" in prompt
    assert prompt.endswith("<|start|>assistant")


@pytest.mark.parametrize("portion", [1, 3, 1000])
async def test_calls(tokenizer: Tokenizer, portion: int) -> None:
    app = served(tokenizer, CALLED, portion)
    async with app.http:
        response = await app.chat(tools=TOOLS)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        history = [
            {"role": "user", "content": "a"},
            choice["message"],
            {"role": "tool", "tool_call_id": call["id"], "content": "7"},
        ]
        assert (await app.chat(messages=history, tools=TOOLS)).status_code == 200
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"], json.loads(call["function"]["arguments"])) == (None, {"city": "Oslo"})
    prompt = tokenizer.decode(app.engine.requests[-1].prompt_ids, skip_special_tokens=False)
    assert THOUGHT.removesuffix("assistant") + "assistant to=functions.weather<|channel|>commentary" in prompt
    assert prompt.endswith('to=assistant<|channel|>commentary<|message|>"7"<|end|><|start|>assistant')
