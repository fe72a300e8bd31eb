"""From a chat request to a Conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pilotfish.errors import shown
from pilotfish.server.errors import bad_parameter
from pilotfish.server.prompting.conversation import Conversation, Role, Turn
from pilotfish.server.protocol.chat import ChatRequest, Message
from pilotfish.server.protocol.tools import CalledFunction, FunctionParam
from pilotfish.text.message import NamedTool, Tool, ToolCall, ToolChoice

_ROLES: dict[str, Role] = {"developer": "system", "function": "tool"}
"""OpenAI's other names of roles, by the names that the templates of open models know."""


def conversation_of(body: ChatRequest) -> Conversation:
    """Translate a request. Raises ApiError 400 that names the place of what contradicts itself."""
    tools, choice = _tools(body)
    continues = goes_on(body.messages, body.continue_final_message, body.add_generation_prompt)
    return Conversation(
        turns=turns_of(body.messages),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False and body.functions is None,
        reasoning_effort=body.reasoning_effort,
        thinking_budget=body.thinking_budget if body.thinking_budget is not None else body.thinking_token_budget,
        template_variables=body.chat_template_kwargs or {},
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
    )


def goes_on(messages: Sequence[Message], continued: bool | None, add: bool | None) -> bool:
    """Return whether an answer goes on with the last message, as `continue_final_message` or the message itself asks
    for. Raises ApiError 400 for what contradicts that."""
    last = messages[-1]
    place = f"messages[{len(messages) - 1}]"
    prefix = last.prefix is True
    if prefix and last.role != "assistant":
        raise bad_parameter(f"{place}.prefix", f"{place}.prefix is only for the role 'assistant'")
    if prefix and continued is False:
        said = f"continue_final_message is false, but {place}.prefix asks to go on with that message"
        raise bad_parameter("continue_final_message", said)
    if not (prefix or continued):
        return False
    if add:
        asks = "continue_final_message" if continued else f"{place}.prefix"
        raise bad_parameter("add_generation_prompt", f"add_generation_prompt and {asks} cannot both be true")
    if last.role != "assistant":
        raise bad_parameter("continue_final_message", "continue_final_message needs an assistant's message at the end")
    for name in ("tool_calls", "function_call"):
        if getattr(last, name):
            where = f"{place}.{name}"
            raise bad_parameter(where, f"{where} ends the message, so that nothing can go on with it")
    return True


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Translate messages. Raises ApiError 400 for what a role cannot have, or lacks."""
    turns: list[Turn] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        calls = tuple(_calls(message, place))
        names |= {call.id: call.name for call in calls}
        if message.content is None and message.role != "assistant":
            raise bad_parameter(
                f"{place}.content", f"Missing required parameter: '{place}.content'.", "missing_required_parameter"
            )
        if calls and message.role != "assistant":
            raise bad_parameter(f"{place}.tool_calls", f"{place}.tool_calls is only for the role 'assistant'")
        role: Any = _ROLES.get(message.role, message.role)
        name = message.name
        if role == "tool":
            name = name or names.get(message.tool_call_id or "")
        reasoning = message.reasoning_content if isinstance(message.reasoning_content, str) else message.reasoning
        turns.append(
            Turn(
                role=role,
                content=message.content,
                name=name,
                reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else None,
                calls=calls,
                call_id=message.tool_call_id if role == "tool" else None,
            )
        )
    return turns


def _calls(message: Message, place: str) -> list[ToolCall]:
    calls = [
        ToolCall(call.id, call.function.name, _arguments(call.function, f"{place}.tool_calls[{i}].function.arguments"))
        for i, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        function = message.function_call
        calls.append(ToolCall("", function.name, _arguments(function, f"{place}.function_call.arguments")))
    return calls


def _arguments(function: CalledFunction, place: str) -> str:
    if isinstance(function.arguments, dict):
        try:
            return json.dumps(function.arguments, ensure_ascii=False)
        except (ValueError, RecursionError):
            raise bad_parameter(place, f"{place} is nested too deeply, or has a number that JSON has not") from None
    return function.arguments or "{}"


def _tools(body: ChatRequest) -> tuple[list[Tool], ToolChoice]:
    if body.tools and body.functions:
        raise bad_parameter("functions", "functions is the older form of tools: give only one of them")
    param = "functions" if body.functions else "tools"
    tools = declared(body.functions or [tool.function for tool in body.tools or ()], param)
    names = [tool.name for tool in tools]
    value, where = (
        (body.function_call, "function_call") if body.function_call is not None else (body.tool_choice, "tool_choice")
    )
    if value is None or value in ("auto", "none"):
        return tools, value or "auto"
    if not tools:
        raise bad_parameter(where, f"{where} is {shown(value)}, but the request has no {param}")
    if value == "required":
        return tools, "required"
    if value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        wanted = [_name_of(each, where) for each in allowed["tools"]]
        for name in wanted:
            _check_known(name, names, where)
        mode: ToolChoice = "required" if allowed["mode"] == "required" else "auto"
        return [tool for tool in tools if tool.name in wanted], mode
    name = _name_of(value, where)
    _check_known(name, names, where)
    return tools, NamedTool(name)


def declared(functions: Sequence[FunctionParam], param: str) -> list[Tool]:
    """Translate what the client sent as `param`, "tools" or "functions". Raises ApiError 400 for a name that is there
    twice."""
    inner = "" if param == "functions" else ".function"
    names: set[str] = set()
    for i, function in enumerate(functions):
        if function.name in names:
            where = f"{param}[{i}]{inner}.name"
            raise bad_parameter(where, f"{where} is {shown(function.name)}, as another tool's is")
        names.add(function.name)
    return [
        Tool(
            name=function.name,
            description=function.description,
            parameters=function.parameters,
            strict=bool(function.strict),
            place=f"{param}[{i}]{inner}.parameters",
        )
        for i, function in enumerate(functions)
    ]


def _name_of(value: Any, where: str) -> str:
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        form = '{"type": "function", "function": {"name": "f"}}'
        raise bad_parameter(where, f"{where} must name functions, as {form}")
    return name


def _check_known(name: str, names: list[str], where: str) -> None:
    if name not in names:
        known = ", ".join(map(repr, names))
        raise bad_parameter(where, f"{where} names {shown(name)}, but the tools are called {known}")
