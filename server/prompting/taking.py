"""Messages in the form that a model's chat template takes: what it would refuse or drop is written otherwise.

All texts are shielded already (see `Tokenizer.shield`); what is added here is the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pilotfish.text.chat_template import TemplateTraits
from pilotfish.text.formats.message_format import MessageFormat

Message = dict[str, Any]
GAP = "\n\n"
"""What is put between texts that are joined."""
WITH_TOOLS = "You are a helpful assistant with some tools."
"""The system message where tools need one, in the words of Phi-4-mini's card."""


def split_calls(messages: Sequence[Message]) -> list[Message]:
    """Give each call a message of its own, followed by its result."""
    found: list[Message] = []
    placed: set[int] = set()
    for at, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            found += [] if at in placed else [message]
            continue
        end = at + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        for i, call in enumerate(calls):
            found.append((message if not i else {"role": "assistant", "content": ""}) | {"tool_calls": [call]})
            own = [k for k in range(at + 1, end) if k not in placed and messages[k].get("tool_call_id") == call["id"]]
            found += [messages[k] for k in own]
            placed.update(own)
    return found


def write_calls(messages: Sequence[Message], form: MessageFormat, calls: bool, results: bool) -> list[Message]:
    """Write `calls`, and `results`, as text, as the model itself would."""
    return [_written(message, form, calls, results) for message in messages]


def _written(message: Message, form: MessageFormat, calls: bool, results: bool) -> Message:
    if calls and (made := message.get("tool_calls")):
        text = form.written_calls([(call["function"]["name"], call["function"]["arguments"]) for call in made])
        content = "\n".join(filter(None, (message["content"], text)))
        return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
    if results and message["role"] == "tool":
        role, content = form.written_result(message["content"])
        return {"role": role, "content": content}
    return message


def put_into_system(messages: Sequence[Message], text: str) -> list[Message]:
    """Add a text to the system message."""
    return _with_system(messages, lambda content: {"content": GAP.join(filter(None, (content, text)))})


def give_tools(messages: Sequence[Message], tools: str) -> list[Message]:
    """Give the system message tools."""
    return _with_system(messages, lambda content: {"content": content or WITH_TOOLS, "tools": tools})


def _with_system(messages: Sequence[Message], change: Callable[[str], Message]) -> list[Message]:
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    system = (first or {"role": "system"}) | change(first["content"] if first else "")
    return [system, *(messages[1:] if first else messages)]


def join_system(messages: Sequence[Message], first: bool) -> list[Message]:
    """Put system messages before the text of the next user's, but for those at the beginning, which become one if the
    template takes a `first`."""
    found: list[Message] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system" and first and all(each["role"] == "system" for each in found):
            if found:
                joined = GAP.join(filter(None, (found[0]["content"], message["content"])))
                found[0] = found[0] | {"content": joined}
            else:
                found.append(message)
        elif message["role"] == "system":
            held.append(message["content"])
        elif held and message["role"] == "user":
            found.append(message | {"content": GAP.join(filter(None, (*held, message["content"])))})
            held = []
        else:
            if held:
                found.append({"role": "user", "content": GAP.join(held)})
                held = []
            found.append(message)
    return [*found, {"role": "user", "content": GAP.join(held)}] if held else found


def join_roles(messages: Sequence[Message]) -> list[Message]:
    """Make one message of users' that follow each other, and of assistants'."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is None or last["role"] != message["role"] or message["role"] not in ("user", "assistant"):
            found.append(message)
            continue
        joined = last | message
        joined["content"] = GAP.join(filter(None, (last["content"], message["content"])))
        for key in ("reasoning_content", "reasoning", "thinking"):
            if key in last and key in message:
                joined[key] = GAP.join((last[key], message[key]))
        if "tool_calls" in last and "tool_calls" in message:
            joined["tool_calls"] = [*last["tool_calls"], *message["tool_calls"]]
        found[-1] = joined
    return found


def end_turns(messages: Sequence[Message]) -> list[Message]:
    """Put an empty answer between the results of calls and a user's message."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1]["role"] == "tool" and message["role"] == "user":
            found.append({"role": "assistant", "content": ""})
        found.append(message)
    return found


def taken(messages: Sequence[Message], form: MessageFormat, traits: TemplateTraits) -> list[Message]:
    """Return messages in a form that a template with these traits takes."""
    found = list(messages)
    if traits.calls and not traits.parallel_calls:
        found = split_calls(found)
    if not traits.calls or not traits.results:
        found = write_calls(found, form, not traits.calls, not traits.results)
    if not traits.later_system:
        found = join_system(found, traits.system)
    if not traits.repeated_roles:
        found = join_roles(found)
    if not traits.user_after_results:
        found = end_turns(found)
    if traits.calls and form.calls is not None and form.calls.id_length:
        found = [_with_short_ids(message, form.calls.id_length) for message in found]
    if traits.calls and form.calls is not None and form.calls.id_form:
        found = _numbered(found, form.calls.id_form)
    return [_with_calls(message, traits) if "tool_calls" in message else message for message in found]


def _with_calls(message: Message, traits: TemplateTraits) -> Message:
    if traits.thinking and "reasoning" in message:
        thinking = GAP.join(filter(None, (message["reasoning"], message["content"])))
        message = message | {"thinking": thinking, "content": ""}
    if traits.calls == "text":
        message = message | {"tool_calls": [_as_text(call) for call in message["tool_calls"]]}
    return message if message["content"] else message | {"content": traits.no_content}


def _numbered(messages: Sequence[Message], form: str) -> list[Message]:
    """Give calls, and their results, ids that are made of names and numbers (Kimi K2)."""
    given: dict[str, str] = {}
    found: list[Message] = []
    index = 0
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                given[call["id"]] = form.format(name=call["function"]["name"], index=index)
                calls.append(call | {"id": given[call["id"]]})
                index += 1
            message = message | {"tool_calls": calls}
        elif "tool_call_id" in message:
            message = message | {"tool_call_id": given.get(message["tool_call_id"], message["tool_call_id"])}
        found.append(message)
    return found


def _with_short_ids(message: Message, length: int) -> Message:
    """Give calls, and their results, ids of `length` letters and digits: other servers' are refused otherwise."""

    def short(id_: str) -> str:
        return re.sub("[^A-Za-z0-9]", "", id_)[-length:].rjust(length, "0")

    if "tool_calls" in message:
        return message | {"tool_calls": [call | {"id": short(call["id"])} for call in message["tool_calls"]]}
    return message | {"tool_call_id": short(message["tool_call_id"])} if "tool_call_id" in message else message


def _as_text(call: Message) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}
