"""Parameters of other servers, and of OpenAI's endpoints, that the Messages API refuses (see `protocol.foreign`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pilotfish.server.protocol.foreign import FOREIGN, Foreign

_EMPTY: tuple[Any, ...] = ("", [], {}, False)
_CHAT = "it is for /v1/chat/completions"


def _instead(instead: str, *names: str, neutral: tuple[Any, ...] = _EMPTY) -> dict[str, Foreign]:
    return {name: Foreign(neutral, instead) for name in names}


MESSAGES_FOREIGN: Mapping[str, Foreign] = {
    **FOREIGN,
    # Anthropic's that need what this server does not have.
    **_instead("leave it out: this server has no tools of its own, and runs none", "mcp_servers", "container"),
    **_instead("send the whole conversation", "thread", "previous_message_id"),
    # Other names of what it has.
    **_instead("the name here is stop_sequences", "stop", "stop_sequence", "stop_words", "stopping_strings"),
    **_instead("the name here is max_tokens", "max_tokens_to_sample", "max_completion_tokens", neutral=()),
    **_instead("the name here is repetition_penalty", "repeat_penalty", neutral=(1,)),
    **_instead("the name here is tools", "functions"),
    **_instead("the name here is tool_choice", "function_call", neutral=("auto", "none")),
    **_instead("use thinking", "think", "enable_thinking", "reasoning"),
    **_instead("use thinking.budget_tokens", "thinking_budget", "thinking_token_budget", neutral=()),
    **_instead("use output_config.effort", "reasoning_effort", neutral=("none",)),
    **_instead("use output_config.format", "format", "response_format", neutral=({"type": "text"}, *_EMPTY)),
    **_instead("use output_config.format", "guided_json", "json_schema", "structured_outputs"),
    **_instead(
        "end messages with an assistant's message: the answer goes on with it",
        "continue_final_message",
        neutral=(False,),
    ),
    **_instead("the template decides", "add_generation_prompt", neutral=(True,)),
    **_instead("this endpoint takes messages", "prompt"),
    # Of OpenAI's endpoints alone.
    **_instead(_CHAT, "n", neutral=(1,)),
    **_instead(_CHAT, "logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids", "logprobs"),
    **_instead(_CHAT, "typical_p", neutral=(1,)),
    **_instead(_CHAT, "min_tokens", neutral=(0,)),
    **_instead(_CHAT, "ignore_eos", "include_stop_str_in_output", neutral=(False,)),
    **_instead(_CHAT, "skip_special_tokens", neutral=(True,)),
}
