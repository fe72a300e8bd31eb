"""Who speaks next: every combination of `continue_final_message`, `add_generation_prompt` and `prefix`."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec

from pilotfish.text.tokenizer import Tokenizer
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import INFO, say

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LAST: dict[str, dict[str, Any]] = {
    "user": {"role": "user", "content": "hi"},
    "system": {"role": "system", "content": "hi"},
    "tool": {"role": "tool", "content": "hi", "tool_call_id": "c"},
    "assistant": {"role": "assistant", "content": "hi"},
    "empty": {"role": "assistant", "content": ""},
    "calls": {"role": "assistant", "content": "hi", "tool_calls": [CALL]},
    "function": {"role": "assistant", "content": "hi", "function_call": CALL["function"]},
}
FLAGS = (None, False, True)


def expected(last: str, continued: bool | None, add: bool | None, prefix: bool | None) -> str:
    """Return the parameter that is at fault, "" for none."""
    own = last not in ("user", "system", "tool")
    if prefix and not own:
        return "messages[1].prefix"
    if prefix and continued is False:
        return "continue_final_message"
    if not prefix and not continued:
        return ""
    if add:
        return "add_generation_prompt"
    if not own:
        return "continue_final_message"
    return {"calls": "messages[1].tool_calls", "function": "messages[1].function_call"}.get(last, "")


async def test_every_combination(tokenizer: Tokenizer) -> None:
    served = ScriptedApp(lambda request: say(request, [5]), tokenizer=tokenizer)
    served.engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
    async with served.http:
        for last, continued, add, prefix in product(LAST, FLAGS, FLAGS, FLAGS):
            messages = [{"role": "user", "content": "a"}, LAST[last] | ({} if prefix is None else {"prefix": prefix})]
            given = {"continue_final_message": continued, "add_generation_prompt": add}
            body = {"messages": messages} | {name: value for name, value in given.items() if value is not None}
            chat = await served.chat(**body)
            tokenized = await served.http.post("/tokenize", json=body)
            param = expected(last, continued, add, prefix)
            if param:
                for response in (chat, tokenized):
                    error = response.json()["error"]
                    assert (response.status_code, error["param"]) == (400, param), (body, error)
                continue
            assert chat.status_code == 200, (body, chat.text)
            ids = served.engine.requests[-1].prompt_ids
            assert list(ids) == tokenized.json()["tokens"]
            prompt = tokenizer.decode(ids, skip_special_tokens=False)
            opened = "<|im_start|>assistant\n"
            if continued or prefix:
                assert prompt.endswith(opened + LAST[last]["content"])
            else:
                assert prompt.endswith("<|im_end|>\n" + (opened if add is not False else "")), body


async def test_prefix_of_an_earlier_message_asks_for_nothing(tokenizer: Tokenizer) -> None:
    served = ScriptedApp(lambda request: say(request, [5]), tokenizer=tokenizer)
    served.engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
    async with served.http:
        messages = [LAST["assistant"] | {"prefix": True}, LAST["user"]]
        assert (await served.chat(messages=messages, add_generation_prompt=True)).status_code == 200
        empty = await served.http.post("/tokenize", json={"messages": []})
        assert (empty.status_code, empty.json()["error"]["param"]) == (400, "messages")


async def test_tools_are_tokenized(tokenizer: Tokenizer) -> None:
    served = ScriptedApp(lambda request: say(request, [5]), tokenizer=tokenizer)
    served.engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
    body = {"messages": [LAST["user"]], "tools": [{"type": "function", "function": {"name": "look_it_up"}}]}
    async with served.http:
        assert (await served.chat(**body)).status_code == 200
        tokens = (await served.http.post("/tokenize", json=body)).json()["tokens"]
    assert list(served.engine.requests[-1].prompt_ids) == tokens
    assert "look_it_up" in tokenizer.decode(tokens)
