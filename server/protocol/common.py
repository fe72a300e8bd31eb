"""The fields that completions and chat share, and validators beyond pydantic's own types.

Types are strict: "0.7" is not a number. null stands for a field's default. The engine checks the bounds of sampling
parameters (`engine.params`); bounds of values that it never sees are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, PlainValidator
from pydantic_core import PydanticCustomError

from pilotfish.errors import shown
from pilotfish.server.protocol.foreign import FOREIGN, Foreign

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT = 7 * 86400
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 200

Prompt = str | list[int]


class ApiModel(BaseModel):
    """A JSON object. Fields that it does not know are kept in `model_extra`, for `protocol.unknown` to judge."""

    model_config = ConfigDict(extra="allow", strict=True)

    foreign: ClassVar[Mapping[str, Foreign]] = FOREIGN
    """Parameters of other servers that it refuses (see `protocol.foreign`)."""


def wrong(problem: str) -> PydanticCustomError:
    """Return the error for a wrong value; `problem` follows the parameter's name in the message."""
    return PydanticCustomError("invalid_parameter", "{problem}", {"problem": problem})


def unsupported(problem: str) -> PydanticCustomError:
    """Return the error for a request that this server does not support; `problem` as for `wrong`."""
    return PydanticCustomError("unsupported_parameter", "{problem}", {"problem": problem})


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise wrong(f"has {len(stops)} strings, but may have at most {MAX_STOPS}")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise wrong(f"has a string of {len(stop)} characters, but each must have 1 to {MAX_STOP_LENGTH}")
    return tuple(stops)


def _words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise wrong("must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise wrong(f"has {len(value)} strings, but may have at most {MAX_BAD_WORDS}")
    for word in value:
        if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
            raise wrong(
                f"has {shown(word)}, but each must have 1 to {MAX_BAD_WORD_LENGTH} characters, not all of them spaces"
            )
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong('must be an object that gives token ids their biases, such as {"50256": -100}')
    biases = {}
    for key, bias in value.items():
        if (
            not (str(key).isascii() and str(key).isdecimal())
            or isinstance(bias, bool)
            or not isinstance(bias, int | float)
        ):
            raise wrong(f"has {shown(key)}: {shown(bias)}, but must have token ids as keys and numbers as values")
        try:
            biases[int(key)] = float(bias)
        except (ValueError, OverflowError) as error:
            raise wrong("has a number that is too large") from error
    return biases


def only(*allowed: Any, otherwise: str) -> AfterValidator:
    """Return a validator that accepts null and the `allowed` values; `otherwise` as the problem in `unsupported`."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise unsupported(otherwise)
        return value

    return AfterValidator(check)


def _prediction(value: Any) -> str | None:
    """Return the predicted text, its parts joined without a separator."""
    if value is None:
        return None
    form = 'must be an object such as {"type": "content", "content": "the text that is expected"}'
    if not isinstance(value, dict) or value.keys() != {"type", "content"}:
        raise wrong(form)
    if value["type"] != "content":
        raise wrong(f"has type {value['type']!r}, but it must be 'content'")
    content = value["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{form}, with content a string or a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong('has a part of its content that is not a text part, such as {"type": "text", "text": "Hello"}')
    return "".join(part["text"] for part in content)


Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)]
Words = Annotated[tuple[str, ...], PlainValidator(_words, json_schema_input_type=list[str] | None)]
Prediction = Annotated[str | None, PlainValidator(_prediction, json_schema_input_type=dict[str, Any] | None)]
Unsupported = Annotated[Any, only([], {}, "", otherwise="is not supported by this server: leave it out")]
"""A field of OpenAI's API that this server does not support: only null and empty values are accepted."""
Choices = Annotated[int | None, Field(ge=1, le=MAX_CHOICES)]


class StreamOptions(ApiModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk, as in other servers of open models."""
    include_obfuscation: bool | None = None
    """Accepted without effect: OpenAI pads chunks to hide their length."""


class SchedulingFields(ApiModel):
    """When a request runs, and for how long."""

    priority: Annotated[int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = None
    """Of the requests of a tenant, those with lower numbers go first, as in vLLM; 0 by default."""
    timeout: Annotated[float | None, Field(gt=0, le=MAX_TIMEOUT)] = None
    """Seconds from its arrival after which the request ends, complete or not, and gives its memory back."""


class GenerationRequest(SchedulingFields):
    """The fields that completions and chat share. null stands for the default."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = {}
    max_tokens: int | None = None
    n: Choices = None
    seed: int | None = None
    """The same seed gives the same text, whatever other requests are running."""
    stop: Stops = ()
    prediction: Prediction = None
    """The expected text of the answer, used to draft from; never changes the answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Users of a tenant have equal shares of the engine; without it, client addresses have."""

    # OpenAI's fields that have no effect here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    """Answers repeat it as "default"."""
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    """Stands for user, if there is none."""

    # Extensions, named as in other servers of open models.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    allowed_token_ids: Annotated[list[int] | None, FailFast()] = None
    """The only tokens that may be drawn."""
    bad_words: Words = ()
    """Texts whose tokens may not occur in the answer, with or without a space before them."""
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    """llama.cpp's name of repetition_penalty."""
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int] | None, FailFast()] = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; the default."""

    # The form of the answer, by OpenAI's name and other servers'; see `protocol.output`.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    """A context-free grammar in GBNF or Lark."""
    json_schema: Any = None

    cache_salt: str | None = None
    """Prefixes are found only by requests of the same tenant with the same salt."""
    speculation: str | None = None
    """Pilotfish's own: "auto", "off" or a drafter; null: the server's default. Never changes the text."""
    include_provenance: bool | None = None
    """Say of each token of the answer which drafter proposed it."""

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
