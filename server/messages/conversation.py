"""A Messages request as a Conversation.

Messages of one role that follow each other are one turn, as with Anthropic; the text blocks of a user's turn are joined
by newlines, as chat's text parts are, while those of an assistant's are what a model wrote without a break. A tool's
result is a turn of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pilotfish.errors import shown
from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.prompting.conversation import Conversation, Turn
from pilotfish.server.protocol.messages import (
    Block,
    ConversationRequest,
    MessageParam,
    RedactedThinkingBlockParam,
    TextBlockParam,
    ThinkingBlockParam,
    ThinkingParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from pilotfish.text.message import NamedTool, Tool, ToolCall, ToolChoice

_FAILED = "Error: "
"""Put before the result of a call that failed: templates have no field for it."""
_MOST = 2**31 - 1
"""A larger budget is the same as this, but may not fit into a message to the engine."""
_EFFORTS = {"xhigh": "high", "max": "high"}
"""Anthropic's levels that templates do not know."""


def conversation_of(body: ConversationRequest) -> Conversation:
    """Translate a request. Raises ApiError 400 that names the place for what is valid JSON, but no conversation."""
    turns = _Turns()
    turns.add(Turn(role="system", content=_joined(body.system)))
    for i, message in enumerate(body.messages):
        turns.take(message, f"messages[{i}]")
    continued = turns.close()
    tools = _tools(body.tools or ())
    effort = None if body.output_config is None else body.output_config.effort
    choice = body.tool_choice
    return Conversation(
        turns=turns.all,
        tools=tools,
        tool_choice=_choice(choice, tools),
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        reasoning_effort=None if effort is None else _EFFORTS.get(effort, effort),
        enable_reasoning=body.thinking is not None and body.thinking.type != "disabled",
        thinking_budget=_budget(body.thinking),
        template_variables=body.chat_template_kwargs or {},
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )


class _Turns:
    def __init__(self) -> None:
        self.all: list[Turn] = []
        self._names: dict[str, str] = {}
        """The names of the tools called so far, by the ids of the calls."""

    def add(self, turn: Turn) -> None:
        """Add a turn, or add it to the last one."""
        last = self.all[-1] if self.all else None
        if last is None or last.role != turn.role or turn.role == "tool":
            if turn.role != "system" or turn.content:
                self.all.append(turn)
            return
        text = "\n".join(one.content for one in (last, turn) if one.content)
        self.all[-1] = replace(
            last,
            content=text or (None if turn.role == "assistant" else ""),
            reasoning="\n".join(filter(None, (last.reasoning, turn.reasoning))) or None,
            calls=(*last.calls, *turn.calls),
        )

    def take(self, message: MessageParam, place: str) -> None:
        match message.role:
            case "system":
                _check(message.content, (TextBlockParam,), "a system message", place)
                self.add(Turn(role="system", content=_joined(message.content)))
            case "user":
                _check(message.content, (TextBlockParam, ToolResultBlockParam), "a user's message", place)
                self._take_users(message.content, place)
            case "assistant":
                kinds = (TextBlockParam, ThinkingBlockParam, RedactedThinkingBlockParam, ToolUseBlockParam)
                _check(message.content, kinds, "an assistant's message", place)
                self._take_assistants(message.content, place)

    def _take_users(self, blocks: Sequence[Block], place: str) -> None:
        texts: list[TextBlockParam] = []
        for i, block in enumerate(blocks):
            match block:
                case TextBlockParam():
                    texts.append(block)
                case ToolResultBlockParam(tool_use_id=id_):
                    if texts:
                        self.add(Turn(role="user", content=_joined(texts)))
                        texts = []
                    if id_ not in self._names:
                        param = f"{place}.content[{i}].tool_use_id"
                        raise bad_parameter(param, f"{param} is {shown(id_)}, but no tool_use before it has that id")
                    content = (_FAILED if block.is_error else "") + _joined(block.content)
                    self.add(Turn(role="tool", content=content, name=self._names[id_], call_id=id_))
        if texts or not blocks:
            self.add(Turn(role="user", content=_joined(texts)))

    def _take_assistants(self, blocks: Sequence[Block], place: str) -> None:
        text, reasoning, calls = "", "", []
        for i, block in enumerate(blocks):
            match block:
                case TextBlockParam():
                    text += block.text
                case ThinkingBlockParam():
                    reasoning += block.thinking
                case ToolUseBlockParam(id=id_, name=name):
                    calls.append(ToolCall(id_, name, _arguments(block.input, f"{place}.content[{i}].input")))
                    self._names[id_] = name
        self.add(Turn(role="assistant", content=text or None, reasoning=reasoning or None, calls=tuple(calls)))

    def close(self) -> bool:
        """Return whether the answer goes on with the last turn. An empty one is left out."""
        last = self.all[-1] if self.all else None
        if last is not None and last.role == "assistant":
            if last.calls:
                raise bad_parameter("messages", "messages ends with a tool_use, but must go on with its tool_result")
            if last.content:
                return True
            self.all.pop()
        if not self.all:
            raise bad_parameter("messages", "messages is empty, but for an assistant's message without text")
        return False


def _check(blocks: Sequence[Block], kinds: tuple[type[Block], ...], where: str, place: str) -> None:
    for i, block in enumerate(blocks):
        if not isinstance(block, kinds):
            param = f"{place}.content[{i}]"
            raise bad_parameter(param, f"{param} has type {block.type!r}, but {where} cannot have that")


def _joined(blocks: Sequence[Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlockParam))


def _arguments(value: dict[str, Any], place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise bad_parameter(place, f"{place} is nested too deeply, or has a number that JSON has not") from None


def _tools(tools: Sequence[ToolParam]) -> list[Tool]:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise bad_parameter(f"tools[{i}].name", f"tools[{i}].name is {shown(tool.name)}, as another tool's is")
        names.add(tool.name)
    return [
        Tool(
            name=tool.name,
            description=tool.description,
            parameters=tool.input_schema,
            strict=bool(tool.strict),
            place=f"tools[{i}].input_schema",
        )
        for i, tool in enumerate(tools)
    ]


def _choice(choice: ToolChoiceParam | None, tools: Sequence[Tool]) -> ToolChoice:
    if choice is None or choice.type == "auto":
        return "auto"
    if choice.type == "none":
        return "none"
    if not tools:
        raise bad_parameter("tool_choice", f"tool_choice is {choice.type!r}, but the request has no tools")
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise _missing("tool_choice.name")
    if choice.name not in {tool.name for tool in tools}:
        known = " or ".join(repr(tool.name) for tool in tools)
        raise bad_parameter(
            "tool_choice.name", f"tool_choice.name is {shown(choice.name)}, but the tools are called {known}"
        )
    return NamedTool(choice.name)


def _budget(thinking: ThinkingParam | None) -> int | None:
    if thinking is None or thinking.type != "enabled":
        return None
    if thinking.budget_tokens is None:
        raise _missing("thinking.budget_tokens")
    return min(thinking.budget_tokens, _MOST)


def _missing(param: str) -> ApiError:
    return bad_parameter(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
