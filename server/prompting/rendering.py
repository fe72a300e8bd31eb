"""From a Conversation to the text of a prompt, by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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


def render(conversation: Conversation, tokenizer: Tokenizer, form: MessageFormat) -> Rendered:
    """Return the prompt of a conversation, in which special tokens that its messages spell are marked as text (see
    `Tokenizer.shield`).

    Takes as long as the template does, so it belongs in a thread. Raises ApiError 400 for reserved names among the
    template's variables, ParameterError if the template fails.
    """
    for name in sorted(_RESERVED.intersection(conversation.template_variables)):
        raise bad_parameter("chat_template_kwargs", f"chat_template_kwargs must not have {name!r}")
    template = tokenizer.chat_template or ""
    knows_tools = "tools" in template
    tools = conversation.tools if conversation.tool_choice != "none" else ()
    variables = dict(conversation.template_variables)
    if conversation.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", conversation.reasoning_effort)
    thinks = conversation.enable_reasoning
    if thinks is None and conversation.reasoning_effort is not None:
        thinks = conversation.reasoning_effort != "none"
    if thinks is not None:
        variables.setdefault("enable_thinking", thinks)
    if knows_tools and tools:
        variables["tools"] = [described(tool) for tool in tools]
    if conversation.continue_final_message:
        variables["continue_final_message"] = True
    turns = conversation.turns if knows_tools or not tools else _with_instructions(conversation.turns, form, tools)
    messages = [_message(turn, tokenizer, knows_tools) for turn in turns]
    text = tokenizer.apply_chat_template(messages, conversation.add_generation_prompt, **variables)
    opened = form.reasoning is not None and text.rstrip().endswith(form.reasoning[0])
    return Rendered(text, opened)


def described(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's form, which templates expect."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _with_instructions(turns: Sequence[Turn], form: MessageFormat, tools: Sequence[Tool]) -> Sequence[Turn]:
    """Put the tools, for a template that does not know any, into the system message."""
    text = form.instructions(tools)
    first = turns[0] if turns and turns[0].role == "system" else None
    system = Turn(role="system", content="\n\n".join(filter(None, (first.content if first else None, text))))
    return [system, *(turns[1:] if first else turns)]


def _message(turn: Turn, tokenizer: Tokenizer, knows_tools: bool) -> dict[str, Any]:
    content = tokenizer.shield(turn.content or "")
    if not knows_tools and turn.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.name is not None:
        message["name"] = turn.name
    if turn.call_id is not None:
        message["tool_call_id"] = turn.call_id
    if turn.reasoning is not None:
        message["reasoning_content"] = message["reasoning"] = tokenizer.shield(turn.reasoning)
    if turn.calls and knows_tools:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call, tokenizer)},
            }
            for call in turn.calls
        ]
    elif turn.calls:
        written = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}' for call in turn.calls]
        calls = [f"<tool_call>\n{tokenizer.shield(each)}\n</tool_call>" for each in written]
        message["content"] = "\n".join(filter(None, (content, *calls)))
    return message


def _arguments(call: ToolCall, tokenizer: Tokenizer) -> Any:
    """Return a call's arguments as an object, as templates want them; what is no JSON object stays text."""
    try:
        value = json.loads(tokenizer.shield(call.arguments) or "{}")
    except (ValueError, RecursionError):
        return tokenizer.shield(call.arguments)
    return value if isinstance(value, dict) else call.arguments
