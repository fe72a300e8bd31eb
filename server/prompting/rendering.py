"""From a Conversation to the text of a prompt, by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pilotfish.server.errors import bad_parameter
from pilotfish.server.prompting.conversation import Conversation, Turn
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.message import Tool, ToolCall
from pilotfish.text.tokenizer import Tokenizer

_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "tokenize", "tokenizer_kwargs",
    "tools", "truncation",
})  # fmt: skip
"""Arguments of apply_chat_template that are not the template's own: clients must not set them."""


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    in_reasoning: bool
    """Whether the prompt has opened the reasoning that the answer begins with."""


@dataclass(frozen=True, slots=True)
class _Written:
    """The system message with instructions for tools, whose client's texts are shielded already."""

    content: str


def render(conversation: Conversation, tokenizer: Tokenizer, form: MessageFormat) -> Rendered:
    """Return the prompt of a conversation, in which special tokens that a client spells, anywhere in it, are marked as
    text (see `Tokenizer.shield`).

    Takes as long as the template does, so it belongs in a thread. Raises ApiError 400 for reserved names among the
    template's variables, ParameterError if the template fails.
    """
    for name in sorted(_RESERVED.intersection(conversation.template_variables)):
        raise bad_parameter("chat_template_kwargs", f"chat_template_kwargs must not have {name!r}")
    template = tokenizer.chat_template or ""
    knows_tools = "tools" in template
    tools = conversation.tools if conversation.tool_choice != "none" else ()
    shield = tokenizer.shield
    variables: dict[str, Any] = shielded(conversation.template_variables, shield)
    if conversation.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", shield(conversation.reasoning_effort))
    thinks = conversation.enable_reasoning
    if thinks is None and conversation.reasoning_effort is not None:
        thinks = conversation.reasoning_effort != "none"
    if thinks is not None:
        variables.setdefault("enable_thinking", thinks)
    if knows_tools and tools:
        variables["tools"] = shielded([described(tool) for tool in tools], shield)
    if conversation.continue_final_message:
        variables["continue_final_message"] = True
    turns = (
        conversation.turns if knows_tools or not tools else _with_instructions(conversation.turns, form, tools, shield)
    )
    messages = [_message(turn, shield, knows_tools) for turn in turns]
    if conversation.continue_final_message:
        _begin(messages[-1], form, shield)
    text = tokenizer.apply_chat_template(messages, conversation.add_generation_prompt, **variables)
    return Rendered(text, _in_reasoning(text, conversation, form))


def shielded(value: Any, shield: Callable[[str], str]) -> Any:
    """Return a JSON value with all of its texts, keys included, shielded."""
    match value:
        case str():
            return shield(value)
        case dict():
            return {shield(key): shielded(each, shield) for key, each in value.items()}
        case list():
            return [shielded(each, shield) for each in value]
    return value


def _begin(message: dict[str, Any], form: MessageFormat, shield: Callable[[str], str]) -> None:
    """Let a message that the answer goes on with open and close reasoning, as the answer itself may."""
    for marker in form.reasoning or ():
        message["content"] = message["content"].replace(shield(marker), marker)


def _in_reasoning(prompt: str, conversation: Conversation, form: MessageFormat) -> bool:
    if form.reasoning is None:
        return False
    begin, end = form.reasoning
    if conversation.continue_final_message:
        begun = conversation.turns[-1].content or ""
        return begun.rfind(begin) > begun.rfind(end)
    return prompt.rstrip().endswith(begin)


def described(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's form, which templates expect."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _with_instructions(
    turns: Sequence[Turn], form: MessageFormat, tools: Sequence[Tool], shield: Callable[[str], str]
) -> Sequence[Turn | _Written]:
    """Put the tools, for a template that does not know any, into the system message."""
    plain = [
        replace(
            tool,
            description=shielded(tool.description, shield),
            parameters=shielded(tool.parameters, shield),
        )
        for tool in tools
    ]
    first = turns[0] if turns and turns[0].role == "system" else None
    given = shield(first.content or "") if first is not None else ""
    system = _Written("\n\n".join(filter(None, (given, form.instructions(plain)))))
    return [system, *(turns[1:] if first else turns)]


def _message(turn: Turn | _Written, shield: Callable[[str], str], knows_tools: bool) -> dict[str, Any]:
    if isinstance(turn, _Written):
        return {"role": "system", "content": turn.content}
    content = shield(turn.content or "")
    if not knows_tools and turn.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.name is not None:
        message["name"] = shield(turn.name)
    if turn.call_id is not None:
        message["tool_call_id"] = shield(turn.call_id)
    if turn.reasoning is not None:
        message["reasoning_content"] = message["reasoning"] = shield(turn.reasoning)
    if turn.calls and knows_tools:
        message["tool_calls"] = [
            {
                "id": shield(call.id),
                "type": "function",
                "function": {"name": shield(call.name), "arguments": _arguments(call, shield)},
            }
            for call in turn.calls
        ]
    elif turn.calls:
        written = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}' for call in turn.calls]
        calls = [f"<tool_call>\n{shield(each)}\n</tool_call>" for each in written]
        message["content"] = "\n".join(filter(None, (content, *calls)))
    return message


def _arguments(call: ToolCall, shield: Callable[[str], str]) -> Any:
    """Return a call's arguments as an object, as templates want them; what is no JSON object stays text."""
    try:
        value = json.loads(call.arguments or "{}")
        if isinstance(value, dict):
            return shielded(value, shield)  # after reading: JSON can spell a special token with escapes
    except (ValueError, RecursionError):
        pass
    return shield(call.arguments)
