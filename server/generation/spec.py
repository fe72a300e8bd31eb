"""GenerationSpec: a request in terms that all endpoints share. An endpoint makes it from its own request type; `fit`
turns it into the engine's SamplingParams for a prompt of a given length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo
from pilotfish.errors import ParameterError
from pilotfish.server.errors import bad_parameter
from pilotfish.server.protocol.common import GenerationRequest, SchedulingFields
from pilotfish.server.protocol.output import output_of
from pilotfish.text.grammar.output_format import OutputFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A request in shared terms, without its prompts."""

    model: str
    params: SamplingParams
    """The parameters as sent: not checked yet, and without max_tokens."""
    max_tokens: int | None = None
    """None, or -1 as llama.cpp's clients have it: as many as fit into the context after the prompt."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The client's names for parameters that it knows by others than the engine."""
    stream: bool = False
    prompts: int = 1
    answers: int = 1
    """Answers to generate for each prompt."""
    stop: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    """Texts that may not occur in the answer; `params.bad_words` has their tokens."""
    include_stop: bool = False
    """Show the stop string that ended an answer."""
    add_special_tokens: bool = False
    """Put the tokenizer's begin-of-text token before a prompt that is text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answers' texts."""
    echo: bool = False
    """Put the prompt before each answer."""
    only_echo: bool = False
    """Show only the prompt."""
    show_logprobs: bool = True
    """False: log-probabilities serve at most to rank answers."""
    provenance: bool = False
    """Say of each token where it came from."""
    cache_salt: str | None = None
    user: str | None = None
    """Whose request it is among those of its tenant; None: its address says so."""
    priority: int = 0
    timeout: float | None = None
    """Seconds from the request's arrival after which it ends, complete or not."""
    speculation: str | None = None
    prediction: str | None = None
    output: OutputFormat | None = None
    """What the answer, or what follows its reasoning, must match."""

    @property
    def sequences(self) -> int:
        """Number of sequences that the engine decodes."""
        return self.prompts * self.answers


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "typical_p", "logit_bias", "min_tokens", "ignore_eos", "seed",
)  # fmt: skip
"""Fields that GenerationRequest and SamplingParams share; None stands for the default."""


def spec_of(
    body: GenerationRequest, *, logprobs: int | None = None, prompt_logprobs: int | None = None, **own: Any
) -> GenerationSpec:
    """Make the spec of a GenerationRequest; `own` are fields that the endpoint sets itself.

    Raises ApiError 400 for fields that contradict each other.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if (
        body.repeat_penalty is not None
        and given.setdefault("repetition_penalty", body.repeat_penalty) != body.repeat_penalty
    ):
        message = "repeat_penalty and repetition_penalty mean the same: give one of them"
        raise bad_parameter("repeat_penalty", message)
    if body.repeat_penalty is not None and body.repetition_penalty is None:
        own["names"] = {**own.get("names", {}), "repetition_penalty": "repeat_penalty"}
    params = SamplingParams(
        **given,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
    )
    shared = {
        "max_tokens": body.max_tokens,
        "answers": body.choices,
        "stream": bool(body.stream),
        "stop": body.stop,
        "bad_words": body.bad_words,
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
        "provenance": bool(body.include_provenance),
        "cache_salt": body.cache_salt,
        **scheduling_of(body, body.user or body.safety_identifier),
        "speculation": body.speculation,
        "prediction": body.prediction,
        "output": output_of(body),
    }
    spec = GenerationSpec(model=body.model, params=params, **shared | own)
    if body.stream_options is not None and not spec.stream:
        raise bad_parameter("stream_options", "stream_options is only allowed with stream: true")
    if spec.prediction is not None and spec.sequences > 1:
        raise bad_parameter(
            "prediction",
            f"prediction is only allowed with a single answer, but this request asks for {spec.sequences}: leave it "
            "out, or ask for 1",
        )
    return spec


def scheduling_of(body: SchedulingFields, user: str | None) -> dict[str, Any]:
    """Return the fields of a spec that say when a request runs."""
    return {"user": user or None, "priority": body.priority or 0, "timeout": body.timeout}


def fit(spec: GenerationSpec, prompt_tokens: int, info: EngineInfo) -> SamplingParams:
    """Return checked parameters for a prompt of `prompt_tokens` tokens, max_tokens cut to what fits into the context.

    Raises ParameterError with the client's name for the parameter at fault.
    """
    room = info.max_model_len - prompt_tokens
    # A larger top_k has the same effect, but may not fit into a message to the engine.
    params = replace(
        spec.params,
        max_tokens=room if spec.max_tokens in (None, -1) else spec.max_tokens,
        top_k=min(spec.params.top_k, info.vocab_size),
    )
    try:
        params.check()
    except ParameterError as error:
        message = error.message
        for ours, theirs in spec.names.items():
            message = message.replace(ours, theirs, 1)
        raise ParameterError(spec.names.get(error.param, error.param), message) from error
    limit = min(params.max_tokens, room)
    return replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))
