"""Conversation: what chat, responses and messages ask for, in shared terms, before it becomes a prompt.

Each endpoint translates its own request into a Conversation; how it becomes a prompt, a grammar and a parser of the
answer is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pilotfish.text.message import Tool, ToolCall, ToolChoice

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str | None = None
    """None for an assistant's turn of nothing but calls."""
    name: str | None = None
    """The author's name; of a tool's turn, the tool's."""
    reasoning: str | None = None
    """An earlier answer's reasoning; most templates leave it out."""
    calls: Sequence[ToolCall] = ()
    """The calls of an assistant's turn."""
    call_id: str | None = None
    """The id of the call that a tool's turn answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    turns: Sequence[Turn]
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    """Passed to the template; "none" and "minimal" turn reasoning off where the template can."""
    enable_reasoning: bool | None = None
    """None: the template's default."""
    thinking_budget: int | None = None
    """Tokens of reasoning after which it is closed; None: no limit."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Go on with the last turn instead of answering it."""
    parse: bool = True
    """Whether reasoning and calls are taken out of the answer's text."""
