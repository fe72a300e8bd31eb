"""Parameters of other servers that change what an answer says, which this server does not have.

They are refused rather than ignored, unless their value asks for nothing. Sources: the request types of vLLM, SGLang,
TensorRT-LLM, LMDeploy, llama.cpp, text-generation-inference, text-generation-webui, KoboldCpp and Ollama. A field of
this server's own request types goes before its entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Foreign:
    """A parameter: the values, beside null, that ask for nothing, and what to use instead of it."""

    neutral: tuple[Any, ...] = ()
    instead: str = "leave it out"
    always_neutral: bool = False
    """It only shapes what another parameter asks for, which is refused itself."""

    def asks_for_nothing(self, value: Any) -> bool:
        if value is None or self.always_neutral:
            return True
        return any(type(value) in (type(none), *_ALIKE.get(type(none), ())) and value == none for none in self.neutral)


_ALIKE: dict[type, tuple[type, ...]] = {float: (int,), int: (float,)}
EMPTY: tuple[Any, ...] = ("", [], {}, False)


def instead(text: str, *names: str, neutral: tuple[Any, ...] = EMPTY) -> dict[str, Foreign]:
    """Return the entries of parameters in whose place to use what `text` says."""
    return _off(*names, neutral=neutral, instead=text)


def _off(*names: str, neutral: tuple[Any, ...] = (0, False), instead: str = "leave it out") -> dict[str, Foreign]:
    return {name: Foreign(neutral, instead) for name in names}


def _shapes(*names: str) -> dict[str, Foreign]:
    return {name: Foreign(always_neutral=True) for name in names}


def _named(ours: str, *names: str, neutral: tuple[Any, ...] = ()) -> dict[str, Foreign]:
    return _off(*names, neutral=neutral, instead=f"the name here is {ours}")


FOREIGN: Mapping[str, Foreign] = {
    # Samplers that are not implemented.
    **_off("dry_multiplier", "xtc_probability", "mirostat", "mirostat_mode", "top_a", "epsilon_cutoff", "eta_cutoff"),
    **_off("smoothing_factor", "dynatemp_range", "dynamic_temperature", "temperature_last", "penalty_alpha", "skew"),
    **_off("no_repeat_ngram_size", "top_p_min", "min_keep", "watermark", "watermarking", "token_healing"),
    **_off("top_n_sigma", "nsigma", neutral=(0, -1)),
    **_off("tfs_z", "tfs", "encoder_repetition_penalty", "guidance_scale", neutral=(1,)),
    **_off("adaptive_target", neutral=(0, -1)),
    **_off("penalty_prompt", "negative_prompt", "custom_token_bans", neutral=EMPTY),
    **_off("samplers", "sampler_order", "sampler_priority", neutral=EMPTY),
    **_off("logits_processors", "custom_logit_processor", neutral=EMPTY),
    **_off("stop_regex", "banned_tokens", "banned_strings", neutral=EMPTY),
    **_off("repetition_detection", "embedding_bias", neutral=EMPTY),
    **_off("repetition_penalty_range", "rep_pen_range", "repeat_last_n", neutral=(-1,)),
    **_off("rep_pen_slope", "repetition_decay"),
    **_shapes("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers"),
    **_shapes("xtc_threshold", "mirostat_tau", "mirostat_eta", "smoothing_curve", "dynatemp_exponent"),
    **_shapes("dynatemp_low", "dynatemp_high", "dynatemp_min", "dynatemp_max", "adaptive_decay", "top_p_reset_ids"),
    **_shapes("penalize_nl", "t_max_predict_ms", "t_max_prompt_ms", "spaces_between_special_tokens", "n_indent"),
    # Beam search, and answers chosen among several.
    **_off("use_beam_search", "early_stopping", instead="this server draws its answers: leave it out, or false"),
    **_off("num_beams", "beam_width", "best_of", neutral=(1,), instead="this server draws its answers: leave it out"),
    **_off("length_penalty", neutral=(1,), instead="it is for beam search, which this server does not have"),
    **_off("diversity_penalty"),
    # Other names of this server's own parameters.
    **_named("repetition_penalty", "rep_pen", neutral=(1,)),
    **_named("typical_p", "typical", "typ_p", neutral=(1,)),
    **_named("max_tokens", "max_new_tokens", "n_predict", "num_predict", "max_length", "max_output_tokens"),
    **_named("min_tokens", "min_new_tokens", "min_length", neutral=(0,)),
    **_named("temperature", "temp"),
    **_named("stop", "stop_sequence", "stop_sequences", "stop_words", "stopping_strings", neutral=EMPTY),
    **_named("ignore_eos", "ban_eos_token", neutral=(False,)),
    **_named("include_stop_str_in_output", "no_stop_trim", neutral=(False,)),
    **_named("seed", "sampling_seed", "random_seed", neutral=(-1,)),
    **_off("do_sample", neutral=(True,), instead="for the likeliest tokens send temperature: 0"),
    # Structure and reasoning.
    **_off("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", neutral=EMPTY),
    **_off("regex", "ebnf", "grammar", "grammar_string", "json_schema", "structural_tag", neutral=EMPTY),
    **_off("think", "thinking", "enable_thinking", "reasoning", neutral=EMPTY),
    **_off("thinking_budget", "thinking_token_budget", "reasoning_effort", neutral=("none",)),
    **_shapes("guided_decoding_backend", "guided_whitespace_pattern"),
    # What would be put before the model, or taken away from it.
    **_off("truncate_prompt_tokens", "truncate", "truncation_length", neutral=(-1, 0), instead="shorten the prompt"),
    **_off("n_keep", "n_discard", neutral=(0, -1)),
    **_shapes("truncation_side"),
    **_off("documents", "input_prefix", "input_suffix", "input_extra", "context", neutral=EMPTY),
    **_off("chat_template", "template", neutral=EMPTY, instead="start the server with --chat-template"),
    **_off("system", neutral=EMPTY, instead="send a message with the role system"),
    **_off("options", neutral=EMPTY, instead="put its values beside the other parameters, by their OpenAI names"),
    **_off("format", neutral=EMPTY, instead="use response_format"),
    **_off("lora", "lora_path", "lora_request", "adapter_id", "adapter", neutral=EMPTY),
    **_off("mm_processor_kwargs", "media_io_kwargs", "images", "videos", neutral=EMPTY),
    **_off("session_params", "custom_params", "vllm_xargs", neutral=EMPTY),
    **_off("detokenize", neutral=(True,)),
    **_off("raw", neutral=(False,), instead="use /v1/completions"),
    # Fields of the other of OpenAI's two endpoints.
    **_off("prompt", neutral=EMPTY, instead="chat takes messages"),
    **_off("messages", neutral=EMPTY, instead="this endpoint takes a prompt: use /v1/chat/completions"),
    **_off("echo", neutral=(False,), instead="it is for /v1/completions"),
    **_off("suffix", neutral=EMPTY),
    **_off("add_special_tokens", neutral=(False,), instead="the chat template adds them"),
    **_off("tools", "functions", neutral=EMPTY, instead="it is for /v1/chat/completions"),
    **_off("tool_choice", "function_call", neutral=("none", "auto"), instead="it is for /v1/chat/completions"),
    **_named("max_tokens", "max_completion_tokens"),
    **_off("continue_final_message", neutral=(False,), instead="it is for /v1/chat/completions"),
    **_off("add_generation_prompt", neutral=(True,), instead="it is for /v1/chat/completions"),
    **_off("chat_template_kwargs", neutral=EMPTY, instead="it is for /v1/chat/completions"),
    **_off("response_format", neutral=({"type": "text"},), instead="it is for /v1/chat/completions"),
    **_off("parallel_tool_calls", neutral=(True, False)),  # without tools it asks for nothing
    **_off("verbosity", neutral=("medium",)),
    **_off("modalities", neutral=(["text"], *EMPTY)),
    **_off("audio", "moderation", "web_search_options", neutral=EMPTY),
    # Fields of /v1/responses and /v1/messages.
    **_off("input", neutral=EMPTY, instead="it is for /v1/responses"),
    **_off("instructions", neutral=EMPTY, instead="send a message with the role system"),
    **_off("previous_response_id", "conversation", neutral=EMPTY, instead="it is for /v1/responses"),
    **_off("background", neutral=(False,), instead="this server answers while you wait"),
    **_off("text", "output_config", "output_format", neutral=EMPTY, instead="use response_format"),
}
"""By name. `_off`: refused unless neutral; `_shapes`: of no effect by itself; `_named`: goes by another name here."""

INERT = frozenset({
    "anthropic_version", "cache_control", "cache_prompt", "context_management", "conversation_id", "diagnostics",
    "id_slot", "include", "include_provenance", "include_reasoning", "inference_geo", "keep_alive",
    "kv_transfer_params", "max_tool_calls", "metadata", "models", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "prompt_logprobs", "provider", "request_id", "return_token_ids",
    "return_tokens_as_token_ids", "rid", "route", "safety_identifier", "separate_reasoning", "service_tier",
    "session_id", "speed", "store", "stream_interval", "stream_options", "timings_per_token", "top_logprobs",
    "transforms", "truncation", "user", "user_profile_id",
})  # fmt: skip
"""Names of OpenAI's and other servers' that are no spelling mistakes, and change no text where they are unknown."""
