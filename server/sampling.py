"""From a request's fields to the engine's SamplingParams."""

from __future__ import annotations

from msgspec.structs import replace

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo
from pilotfish.errors import ParameterError
from pilotfish.server.errors import bad_parameter
from pilotfish.server.protocol.common import GenerationRequest


def sampling_params(
    body: GenerationRequest,
    info: EngineInfo,
    prompt_tokens: int,
    max_tokens: int | None,
    *,
    max_tokens_name: str = "max_tokens",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Checked parameters. max_tokens is cut to what the context has room for after the prompt; None: all of that.

    Raises ParameterError with the client's name for the parameter at fault.
    """
    room = info.max_model_len - prompt_tokens
    default = SamplingParams()
    top_k = default.top_k if body.top_k is None else body.top_k
    params = SamplingParams(
        temperature=_given(body.temperature, default.temperature),
        top_p=_given(body.top_p, default.top_p),
        top_k=min(top_k, info.vocab_size),  # more means the same, and need not fit into a message
        min_p=_given(body.min_p, default.min_p),
        presence_penalty=_given(body.presence_penalty, default.presence_penalty),
        frequency_penalty=_given(body.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_given(body.repetition_penalty, default.repetition_penalty),
        logit_bias=body.logit_bias,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=default.min_tokens if body.min_tokens is None else body.min_tokens,
        max_tokens=room if max_tokens is None else max_tokens,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
    )
    try:
        params.check()
    except ParameterError as error:
        if error.param != "max_tokens":
            raise
        raise ParameterError(max_tokens_name, error.message.replace("max_tokens", max_tokens_name, 1)) from error
    limit = min(params.max_tokens, room)
    return replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))


def check_streaming(body: GenerationRequest) -> None:
    """Raise ApiError 400 for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise bad_parameter("stream_options", "stream_options is only allowed with stream: true")


def check_prediction(body: GenerationRequest, answers: int) -> None:
    """Raise ApiError 400 for a prediction where there is more than one answer, as OpenAI does."""
    if body.prediction is not None and answers > 1:
        raise bad_parameter(
            "prediction",
            f"prediction is for one answer, but this request asks for {answers}: leave it out, or ask for 1",
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)
