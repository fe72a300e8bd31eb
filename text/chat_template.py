"""What a model's chat template takes of a conversation, found by rendering small ones: templates differ in more ways
than their text tells, and what a template drops, or refuses, can be put into a form that it does take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pilotfish.errors import ParameterError

_A, _B = "fjordlark", "saltmoss"
"""What is looked for in the prompts; no template has them."""
_ID = "call00001"
"""An id of a call that Mistral's templates take, too: 9 letters and digits."""
_USER = {"role": "user", "content": "a"}
_ASSISTANT = {"role": "assistant", "content": "b"}

Message = dict[str, Any]
Apply = Callable[..., str]
"""Tokenizer.apply_chat_template, or what has its signature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """What a template takes. What it takes, it shows: it neither refuses nor drops it."""

    system: bool = True
    """A system message at the beginning."""
    later_system: bool = True
    """Further system messages, wherever they are."""
    repeated_roles: bool = True
    """Two messages of the same role, one after the other."""
    tools: Literal["variable", "system", ""] = "variable"
    """Tools: as the variable `tools`, or as text under the key `tools` of the system message (Phi-4-mini)."""
    calls: Literal["object", "text", ""] = "object"
    """An assistant's `tool_calls`: with arguments as an object, or as JSON text (DeepSeek)."""
    no_content: str | None = ""
    """The content of a message of nothing but calls."""
    parallel_calls: bool = True
    """Several calls in a message. Llama's templates refuse them, gpt-oss's shows the first one."""
    results: bool = True
    """The role `tool`, beside calls: many templates write any role that they are given."""
    user_after_results: bool = True
    """A user's message behind results. Mistral's templates refuse it: only an answer ends a user's turn."""
    thinking: bool = False
    """Reasoning under the key `thinking` (gpt-oss), which has no place beside content."""


def traits_of(apply: Apply) -> TemplateTraits:
    """Return the traits of the template that `apply` applies; of one that takes not even a user's message, the usual
    ones, so that the client gets to know what it says."""
    if not _shows(apply, [{"role": "user", "content": _A}], (_A,)):
        return TemplateTraits()
    system = _shows(apply, [_system(_A), _USER], (_A,))
    calls, no_content, by_id = _calls(apply)
    kind: Any = calls or "object"
    pair = [_called(_A, kind, no_content, by_id, _B), _result("c")]
    one = _called("f", kind, no_content, by_id)
    return TemplateTraits(
        system=system,
        later_system=system
        and _shows(apply, [_system(_A), _USER, _ASSISTANT, _system(_B), _USER], (_A, _B))
        and _shows(apply, [_system(_A), _system(_B), _USER], (_A, _B)),
        repeated_roles=_shows(apply, [{"role": "user", "content": _A}, {"role": "user", "content": _B}], (_A, _B))
        and _shows(
            apply, [_USER, {"role": "assistant", "content": _A}, {"role": "assistant", "content": _B}], (_A, _B)
        ),
        tools=_tools(apply),
        calls=calls,
        no_content=no_content,
        parallel_calls=bool(calls) and _shows(apply, [_USER, *pair, _result("d")], (_A, _B)),
        results=bool(calls) and _shows(apply, [_USER, one, _result(_A)], (_A,)),
        user_after_results=not calls
        or _shows(apply, [_USER, one, _result("c"), {"role": "user", "content": _A}], (_A,)),
        thinking=bool(calls) and _shows(apply, [_USER, one | {"thinking": _A}, _result("c")], (_A,)),
    )


def _calls(apply: Apply) -> tuple[Literal["object", "text", ""], str | None, bool]:
    """Return the traits `calls` and `no_content`, and whether the name of a call is shown as a part of its id."""
    for by_id, no_content, kind in product((False, True), ("", None), ("object", "text")):
        if _shows(apply, [_USER, _called(_A, kind, no_content, by_id), _result("c")], (_A, "amount", "17")):
            return kind, no_content, by_id  # type: ignore[return-value]
    return "", "", False


def _tools(apply: Apply) -> Literal["variable", "system", ""]:
    tools = [{"type": "function", "function": {"name": _A, "description": "d", "parameters": {"type": "object"}}}]
    for messages in ([_USER], [_system("s"), _USER]):
        if _shows(apply, messages, (_A,), tools=tools):
            return "variable"
    return "system" if _shows(apply, [_system("s") | {"tools": _A}, _USER], (_A,)) else ""


def _shows(apply: Apply, messages: list[Message], wanted: tuple[str, ...], **variables: Any) -> bool:
    try:
        prompt = apply([dict(message) for message in messages], True, **variables)
    except ParameterError:
        return False
    return all(each in prompt for each in wanted)


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _called(name: str, kind: str, content: str | None, by_id: bool, *others: str) -> Message:
    """Return a message with calls of functions by their names, which `by_id` are part of the ids (Kimi K2)."""
    given = {"amount": 17}
    arguments = given if kind == "object" else json.dumps(given)
    calls = [
        {
            "id": f"functions.{each}:{i}" if by_id else f"{_ID[:-1]}{i}",
            "type": "function",
            "function": {"name": each, "arguments": arguments},
        }
        for i, each in enumerate((name, *others), 1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _result(content: str) -> Message:
    return {"role": "tool", "content": content, "name": "f", "tool_call_id": _ID}
