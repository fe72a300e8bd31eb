"""Parameters of chat and of other servers that the Responses API refuses (see `protocol.foreign`)."""

from __future__ import annotations

from collections.abc import Mapping

from pilotfish.server.protocol.foreign import EMPTY, FOREIGN, Foreign, instead

_CHAT = "it is for /v1/chat/completions"

RESPONSES_FOREIGN: Mapping[str, Foreign] = {
    **FOREIGN,
    # Other names of what it has.
    **instead("the name here is input", "messages", "prompt"),
    **instead("the name here is max_output_tokens", "max_tokens", "max_completion_tokens", neutral=()),
    **instead("the name here is repetition_penalty", "repeat_penalty", neutral=(1,)),
    **instead("the name here is thinking_budget", "thinking_token_budget", neutral=()),
    **instead("the name here is tools", "functions"),
    **instead("the name here is tool_choice", "function_call", neutral=("auto", "none")),
    **instead("use reasoning.effort", "reasoning_effort", neutral=("none",)),
    **instead("use reasoning, or chat_template_kwargs", "think", "thinking", "enable_thinking"),
    **instead("use text.format", "response_format", neutral=({"type": "text"}, *EMPTY)),
    **instead("use text.format", "format", "guided_json", "json_schema", "structured_outputs", "output_format"),
    **instead("use text.format", "output_config"),
    **instead("use text.verbosity", "verbosity", neutral=("medium",)),
    **instead("use instructions", "system"),
    **instead('use include: ["message.output_text.logprobs"]', "logprobs"),
    # Of the other endpoints alone.
    **instead(_CHAT, "n", neutral=(1,)),
    **instead(_CHAT, "stop", "logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids"),
    **instead(_CHAT, "typical_p", neutral=(1,)),
    **instead(_CHAT, "min_tokens", neutral=(0,)),
    **instead(_CHAT, "ignore_eos", "include_stop_str_in_output", neutral=(False,)),
    **instead(_CHAT, "skip_special_tokens", neutral=(True,)),
}
