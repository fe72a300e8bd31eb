"""From a Conversation to the text of a prompt, by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pilotfish.server.errors import bad_parameter
from pilotfish.server.prompting.conversation import Conversation, Turn
from pilotfish.server.prompting.taking import Message, give_tools, put_into_system, taken
from pilotfish.text.chat_template import TemplateTraits, traits_of
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.message import Tool, ToolCall
from pilotfish.text.tokenizer import Tokenizer

_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "tokenize", "tokenizer_kwargs",
    "tools", "truncation",
})  # fmt: skip
"""Arguments of apply_chat_template that are not the template's own: clients must not set them."""

NO_EFFORT = ("none", "minimal")
"""Values of reasoning_effort that turn reasoning off, where the template can."""


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    in_reasoning: bool
    """Whether the prompt has opened the reasoning that the answer begins with."""


class Renderer:
    """Renders conversations with one model's chat template. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def traits(self) -> TemplateTraits:
        """What the template takes. The first time, it is rendered a dozen times to find out."""
        return traits_of(self._tokenizer.apply_chat_template)

    def render(self, conversation: Conversation, form: MessageFormat) -> Rendered:
        """Return the prompt of a conversation, in which special tokens that a client spells, anywhere in it, are
        marked as text (see `Tokenizer.shield`).

        Takes as long as the template does, so it belongs in a thread. Raises ApiError 400 for reserved names among the
        template's variables, ParameterError if the template fails.
        """
        for name in sorted(_RESERVED.intersection(conversation.template_variables)):
            raise bad_parameter("chat_template_kwargs", f"chat_template_kwargs must not have {name!r}")
        shield = self._tokenizer.shield
        variables = _variables(conversation, form, shield)
        messages = [_message(turn, shield) for turn in conversation.turns]
        tools = conversation.tools if conversation.tool_choice != "none" else ()
        if tools and self.traits.tools == "variable":
            variables["tools"] = shielded([described(tool) for tool in tools], shield)
        elif tools and self.traits.tools == "system":
            functions = shielded([described(tool)["function"] for tool in tools], shield)
            messages = give_tools(messages, json.dumps(functions, ensure_ascii=False))
        elif tools:
            messages = put_into_system(messages, _instructions(form, tools, shield))
        messages = taken(messages, form, self.traits)
        if conversation.continue_final_message:
            variables["continue_final_message"] = True
            _begin(messages[-1], form, shield)
        text = self._tokenizer.apply_chat_template(messages, conversation.add_generation_prompt, **variables)
        return Rendered(text, _in_reasoning(text, conversation, form))


def _variables(conversation: Conversation, form: MessageFormat, shield: Callable[[str], str]) -> dict[str, Any]:
    """Return the variables of the template. Reasoning is switched by two names."""
    variables: dict[str, Any] = shielded(conversation.template_variables, shield)
    effort, thinks = conversation.reasoning_effort, conversation.enable_reasoning
    if effort is not None:
        variables.setdefault("reasoning_effort", shield(form.effort(effort)))
        thinks = effort not in NO_EFFORT if thinks is None else thinks
    if thinks is not None:
        variables.setdefault("enable_thinking", thinks)
    if "enable_thinking" in variables:
        variables.setdefault("thinking", variables["enable_thinking"])
    return variables


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


def _instructions(form: MessageFormat, tools: Sequence[Tool], shield: Callable[[str], str]) -> str:
    """Return the tools, and how to call them, as text."""
    return form.instructions(
        [
            replace(
                tool,
                description=shielded(tool.description, shield),
                parameters=shielded(tool.parameters, shield),
            )
            for tool in tools
        ]
    )


def _message(turn: Turn, shield: Callable[[str], str]) -> Message:
    message: Message = {"role": turn.role, "content": shield(turn.content or "")}
    if turn.name is not None:
        message["name"] = shield(turn.name)
    if turn.call_id is not None:
        message["tool_call_id"] = shield(turn.call_id)
    if turn.reasoning is not None:
        message["reasoning_content"] = message["reasoning"] = shield(turn.reasoning)
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": shield(call.id),
                "type": "function",
                "function": {"name": shield(call.name), "arguments": _arguments(call, shield)},
            }
            for call in turn.calls
        ]
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
