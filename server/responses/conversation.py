"""From a Responses request to a Conversation."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from pilotfish.errors import shown
from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.prompting.conversation import Conversation, Turn
from pilotfish.server.protocol.responses import ResponsesRequest
from pilotfish.text.grammar.output_format import ANY_OBJECT, OutputFormat
from pilotfish.text.message import NamedTool, Tool, ToolCall, ToolChoice

_ROLES: dict[str, Any] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


_REPEATED = (
    "input", "instructions", "metadata", "previous_response_id", "reasoning", "text", "tool_choice", "tools", "user",
)  # fmt: skip
"""Fields that are stored, or part of the response."""
_encode = msgspec.json.Encoder(enc_hook=lambda model: model.model_dump()).encode


def check_unicode(body: ResponsesRequest) -> None:
    """Raise ApiError 400 for a field that JSON can spell, but no response can have: with a lone surrogate."""
    for name in _REPEATED:
        try:
            _encode(getattr(body, name))
        except UnicodeEncodeError:
            raise bad_parameter(name, f"{name} is not valid Unicode text (it has a lone surrogate)") from None


def items_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the request's input as items."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    items: list[dict[str, Any]] = body.input
    return items


def listed(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it is listed and referred to: with an id, a status, and a message's text as parts."""
    kind = item.get("type", "message")
    id_ = f"{_PREFIXES.get(kind, 'item')}_{secrets.token_hex(16)}"
    found = {"type": kind, "id": id_, "status": "completed", **item}
    if kind == "message" and isinstance(item["content"], str):
        own = item["role"] == "assistant"
        part = {"type": "output_text", "text": item["content"], "annotations": []}
        found["content"] = [part if own else {"type": "input_text", "text": item["content"]}]
    if not isinstance(found["id"], str):
        found["id"] = id_
    return found


def conversation_of(body: ResponsesRequest, history: Sequence[dict[str, Any]]) -> Conversation:
    """Translate a request that goes on from the items in `history`. Raises ApiError 400 with the place at fault."""
    turns = _Turns(history)
    if body.instructions:
        turns.all.append(Turn(role="system", content=body.instructions))
    for item in history:
        turns.take(item, "previous_response_id")
    for i, item in enumerate(items_of(body)):
        turns.take(item, f"input[{i}]")
    turns.close()
    if not any(turn.role != "system" for turn in turns.all):
        raise bad_parameter("input", "input must have at least one message")
    tools, choice = _tools(body)
    return Conversation(
        turns=turns.all,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        thinking_budget=body.thinking_budget,
        template_variables=body.chat_template_kwargs or {},
    )


def output_of(body: ResponsesRequest) -> OutputFormat | None:
    """Return what the answer must match, from text.format."""
    form = None if body.text is None else body.text.format
    place = "text.format"
    match None if form is None else form.get("type"):
        case None if form is None:
            return None
        case "text":
            return None
        case "json_object":
            return OutputFormat("json_schema", ANY_OBJECT, place)
        case "json_schema":
            assert form is not None
            if "schema" not in form:
                raise _missing(f"{place}.schema")
            return OutputFormat("json_schema", form["schema"], f"{place}.schema")
        case kind:
            message = f"{place}.type is {shown(kind)}, but must be 'text', 'json_object' or 'json_schema'"
            raise bad_parameter(f"{place}.type", message)


class _Turns:
    def __init__(self, history: Sequence[dict[str, Any]]) -> None:
        self.all: list[Turn] = []
        self._by_id = {item["id"]: item for item in history if isinstance(item.get("id"), str)}
        self._names: dict[str, str] = {}
        self._own: Turn | None = None
        """The assistant's turn that is being put together of reasoning, a message and calls."""

    def take(self, item: dict[str, Any], place: str) -> None:
        kind = item.get("type", "message")
        match kind:
            case "message":
                self._message(item, place)
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                text = "\n".join(part["text"] for part in parts if isinstance(part, dict) and _is_text(part))
                self._add(Turn(role="assistant", reasoning=text or None))
            case "function_call":
                call_id, name = _string(item, "call_id", place), _string(item, "name", place)
                self._names[call_id] = name
                arguments = item.get("arguments") or "{}"
                if not isinstance(arguments, str):
                    raise bad_parameter(f"{place}.arguments", f"{place}.arguments must be a string of JSON")
                self._add(Turn(role="assistant", calls=(ToolCall(call_id, name, arguments),)))
            case "function_call_output":
                call_id = _string(item, "call_id", place)
                if "output" not in item:
                    raise _missing(f"{place}.output")
                content = _text(item["output"], f"{place}.output")
                self.close()
                self.all.append(Turn(role="tool", content=content, name=self._names.get(call_id), call_id=call_id))
            case "item_reference":
                id_ = _string(item, "id", place)
                if id_ not in self._by_id:
                    raise bad_parameter(f"{place}.id", f"{place}.id is {shown(id_)}, but there is no such item")
                self.take(self._by_id[id_], place)
            case _:
                known = "'message', 'reasoning', 'function_call', 'function_call_output' and 'item_reference'"
                raise ApiError(
                    400,
                    f"{place}.type is {shown(kind)}, but this server takes only {known}",
                    param=f"{place}.type",
                    code="unsupported_parameter",
                )

    def close(self) -> None:
        """End the assistant's turn that is being put together. Reasoning alone is no turn."""
        if self._own is not None and (self._own.content is not None or self._own.calls):
            self.all.append(self._own)
        self._own = None

    def _message(self, item: dict[str, Any], place: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            known = ", ".join(map(repr, _ROLES))
            raise bad_parameter(f"{place}.role", f"{place}.role is {shown(role)}, but must be one of {known}")
        if "content" not in item:
            raise _missing(f"{place}.content")
        turn = Turn(role=_ROLES[role], content=_text(item["content"], f"{place}.content"))
        if turn.role == "assistant":
            self._add(turn)
        else:
            self.close()
            self.all.append(turn)

    def _add(self, turn: Turn) -> None:
        own = self._own
        if own is None:
            self._own = turn
            return
        if (turn.reasoning or turn.content) and (own.calls or (own.content and turn.reasoning)):
            self.close()
            self._own = turn
            return
        text = "\n".join(each for each in (own.content, turn.content) if each)
        content = text or (own.content if turn.content is None else turn.content)
        reasoning = "\n".join(filter(None, (own.reasoning, turn.reasoning))) or None
        self._own = replace(own, content=content, reasoning=reasoning, calls=(*own.calls, *turn.calls))


def _is_text(part: dict[str, Any]) -> bool:
    return isinstance(part.get("text"), str)


def _text(value: Any, place: str) -> str:
    """Return a text, or the text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_parameter(place, f"{place} must be a string or a list of parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text") and _is_text(part):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        else:
            where = f"{place}[{i}]"
            raise ApiError(
                400,
                f"{where} has type {shown(kind)}, but this model takes only text, as input_text or output_text",
                param=where,
                code="unsupported_parameter",
            )
    return "\n".join(texts)


def _tools(body: ResponsesRequest) -> tuple[list[Tool], ToolChoice]:
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())]
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise bad_parameter(f"tools[{i}].name", f"tools[{i}].name is {shown(name)}, as another tool's is")
    value = body.tool_choice
    if value is None or value in ("auto", "none"):
        return tools, value or "auto"
    if not tools:
        raise bad_parameter("tool_choice", f"tool_choice is {shown(value)}, but the request has no tools")
    if value == "required":
        return tools, "required"
    if isinstance(value, dict) and value.get("type") == "function" and value.get("name") in names:
        return tools, NamedTool(value["name"])
    if isinstance(value, dict) and value.get("type") == "allowed_tools" and isinstance(value.get("tools"), list):
        wanted = [each.get("name") for each in value["tools"] if isinstance(each, dict)]
        kept = [tool for tool in tools if tool.name in wanted]
        if kept:
            return kept, "required" if value.get("mode") == "required" else "auto"
    form = '"auto", "none", "required", or {"type": "function", "name": ...} of one of the tools'
    raise bad_parameter("tool_choice", f"tool_choice is {shown(value)}, but must be {form}")


def _tool(tool: dict[str, Any], place: str) -> Tool:
    if tool.get("type") != "function":
        raise ApiError(
            400,
            f"{place}.type is {shown(tool.get('type'))}, but this server knows only tools of type 'function'",
            param=f"{place}.type",
            code="unsupported_parameter",
        )
    parameters, description = tool.get("parameters"), tool.get("description")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_parameter(f"{place}.parameters", f"{place}.parameters must be a JSON schema, which is an object")
    if description is not None and not isinstance(description, str):
        raise bad_parameter(f"{place}.description", f"{place}.description must be a string")
    name = _string(tool, "name", place)
    return Tool(
        name=name,
        description=description,
        parameters=parameters,
        strict=tool.get("strict") is True,
        place=f"{place}.parameters",
    )


def _string(item: dict[str, Any], key: str, place: str) -> str:
    value = item.get(key)
    if value is None:
        raise _missing(f"{place}.{key}")
    if not isinstance(value, str) or not value or len(value) > 256:
        raise bad_parameter(f"{place}.{key}", f"{place}.{key} must be a string of 1 to 256 characters")
    return value


def _missing(param: str) -> ApiError:
    return bad_parameter(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
