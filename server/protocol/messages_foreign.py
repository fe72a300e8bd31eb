"""Parameters of other servers, and of OpenAI's endpoints, that the Messages API refuses (see `protocol.foreign`)."""

from __future__ import annotations

from collections.abc import Mapping

from pilotfish.server.protocol.foreign import EMPTY, FOREIGN, Foreign, instead

_CHAT = "it is for /v1/chat/completions"

MESSAGES_FOREIGN: Mapping[str, Foreign] = {
    **FOREIGN,
    # Anthropic's that need what this server does not have.
    **instead("leave it out: this server has no tools of its own, and runs none", "mcp_servers", "container"),
    **instead("send the whole conversation", "thread", "previous_message_id"),
    # Other names of what it has.
    **instead("the name here is stop_sequences", "stop", "stop_sequence", "stop_words", "stopping_strings"),
    **instead("the name here is max_tokens", "max_tokens_to_sample", "max_completion_tokens", neutral=()),
    **instead("the name here is repetition_penalty", "repeat_penalty", neutral=(1,)),
    **instead("the name here is tools", "functions"),
    **instead("the name here is tool_choice", "function_call", neutral=("auto", "none")),
    **instead("use tool_choice.disable_parallel_tool_use", "parallel_tool_calls", neutral=(True,)),
    **instead("use thinking", "think", "enable_thinking", "reasoning"),
    **instead("use thinking.budget_tokens", "thinking_budget", "thinking_token_budget", neutral=()),
    **instead("use output_config.effort", "reasoning_effort", neutral=("none",)),
    **instead("use output_config.format", "format", "response_format", neutral=({"type": "text"}, *EMPTY)),
    **instead("use output_config.format", "guided_json", "json_schema", "structured_outputs", "text"),
    **instead("use system", "instructions"),
    **instead("this endpoint takes messages", "input"),
    **instead("send the whole conversation", "previous_response_id", "conversation"),
    **instead(
        "end messages with an assistant's message: the answer goes on with it",
        "continue_final_message",
        neutral=(False,),
    ),
    **instead("the template decides", "add_generation_prompt", neutral=(True,)),
    **instead("this endpoint takes messages", "prompt"),
    # Of OpenAI's endpoints alone.
    **instead(_CHAT, "n", neutral=(1,)),
    **instead(_CHAT, "logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids", "logprobs"),
    **instead(_CHAT, "typical_p", neutral=(1,)),
    **instead(_CHAT, "min_tokens", neutral=(0,)),
    **instead(_CHAT, "ignore_eos", "include_stop_str_in_output", neutral=(False,)),
    **instead(_CHAT, "skip_special_tokens", neutral=(True,)),
}
