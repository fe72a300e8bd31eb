"""The API's errors: routes raise `ApiError`, `as_api_error` converts any other exception, and an `ErrorForm` makes the
JSON. Of an internal error, clients learn only the request id to look for in the log.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pilotfish.errors import EngineDeadError, EngineNotReadyError, EngineRestartingError, ParameterError, shown
from pilotfish.server.encoding import ErrorBody, ErrorFields, json_response

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
OVER_LIMIT = "rate_limit_exceeded"

LONGEST_MESSAGE = 1000
LONGEST_PARAM = 200

WANTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""What a value must be, in JSON's words, by pydantic's name of what is wrong."""


class ApiError(Exception):
    """An error response. `retry_after` is in seconds, from 0 up."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = _shortened(_encodable(message), LONGEST_MESSAGE)
        self.param = None if param is None else _shortened(_encodable(param), LONGEST_PARAM)
        self.status, self.type, self.code, self.retry_after = status, type, code, retry_after
        self.request_id: str | None = None
        """The id of the request that failed, once it is known."""

    def response(self, form: ErrorForm) -> Response:
        return json_response(form(self), self.status, self.retry_headers)

    @property
    def retry_headers(self) -> dict[str, str]:
        """When to try again: in whole seconds, as HTTP has it, and to the millisecond, as OpenAI's clients read it."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(math.ceil(self.retry_after)), "retry-after-ms": str(round(self.retry_after * 1000))}


class ContextLengthError(ApiError):
    """A prompt that leaves no room for an answer. `tokens`: its length, or at least that."""

    def __init__(self, param: str, tokens: int, exact: bool, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(
            400,
            f"This model's maximum context length is {limit} tokens, of which an answer needs at least 1. However, "
            f"your {param} resulted in {'' if exact else 'at least '}{tokens} tokens.",
            param=param,
            code="context_length_exceeded",
        )


def _encodable(text: str) -> str:
    """Escape lone surrogates, which a quoted request may contain and UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


ErrorForm = Callable[[ApiError], msgspec.Struct]
"""Makes the JSON object that clients receive for an error."""


def openai_error(error: ApiError) -> ErrorBody:
    return ErrorBody(ErrorFields(error.message, error.type, error.param, error.code))


def bad_parameter(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str, served: tuple[str, ...]) -> ApiError:
    known = " or ".join(repr(known) for known in served)
    return ApiError(
        404, f"The model {name!r} does not exist: this server serves {known}.", param="model", code="model_not_found"
    )


def unknown_url(meant: str | None = None) -> ApiError:
    """`meant`: the path that the client probably meant."""
    hint = "see the server's /docs for the endpoints that exist" if meant is None else f"did you mean {meant}"
    return ApiError(404, f"Unknown request URL: {hint}{'.' if meant is None else '?'}", code="unknown_url")


def _spread(seconds: float) -> float:
    """Return a time up to half as long again, at random, so that clients do not all come back at once."""
    return seconds * (1 + random.random() / 2)


def loading() -> ApiError:
    return ApiError(
        503,
        "The model is still loading: try again shortly, or wait until /ready returns 200.",
        type=SERVER_ERROR,
        code="model_loading",
        retry_after=_spread(2),
    )


def stopping(message: str = "The server is stopping.") -> ApiError:
    return ApiError(503, message, type=SERVER_ERROR, code="server_stopping", retry_after=_spread(10))


def cut_short() -> ApiError:
    return stopping("The server is stopping and ended this answer before it was complete.")


def _too_many(message: str, code: str, retry_after: float) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code=code, retry_after=retry_after)


def queue_full(in_flight: int, limit: int, retry_after: float) -> ApiError:
    return _too_many(
        f"The queue is full: {in_flight} of at most {limit} sequences are in flight. Try again later.",
        "queue_full",
        retry_after,
    )


def queue_too_long(wait: float, most: float, retry_after: float) -> ApiError:
    """`wait`: the seconds that the request would probably wait, where it may wait for `most`."""
    return _too_many(
        f"The request would probably wait for {wait:.1f} s, but may wait for {most:g} s. Try again later.",
        "queue_too_long",
        retry_after,
    )


def tokens_full(in_flight: int, tokens: int, limit: int, retry_after: float) -> ApiError:
    return _too_many(
        f"The request may come to {tokens} tokens of prompt and answer, but those in flight have {in_flight} of at "
        f"most {limit}. Try again later, or with a smaller max_tokens.",
        "tokens_full",
        retry_after,
    )


def over_limit(limit: str, said: str, retry_after: float) -> ApiError:
    """`limit`: the name of a tenant's limit that is used up; `said`: how."""
    return _too_many(
        f"The limit {limit} of this API key's tenant is reached: {said}. Try again later.",
        OVER_LIMIT,
        max(0.1, retry_after),
    )


def timed_out() -> ApiError:
    message = "The request's timeout passed before its answer was complete."
    return ApiError(504, message, type="timeout_error", code="timeout")


def bodies_full(message: str, retry_after: float | None = None) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="bodies_full", retry_after=retry_after)


def engine_dead() -> ApiError:
    """Why it has ended is the operator's: the log says it."""
    message = "The engine has ended, and the server must be restarted: its log says why."
    return ApiError(503, message, type=SERVER_ERROR, code="engine_dead")


def engine_restarting(retry_after: float, cut: bool = False) -> ApiError:
    """`retry_after`: seconds until the engine will probably be ready; `cut`: whether it ended in the middle of this
    answer."""
    what = "ended before this answer was complete, and is" if cut else "is"
    return ApiError(
        503,
        f"The engine {what} being restarted: send the request again shortly.",
        type=SERVER_ERROR,
        code="engine_restarting",
        retry_after=_spread(retry_after),
    )


def internal(request_id: str) -> ApiError:
    message = f"The server had an error while processing your request. Look for request id {request_id} in its log."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """Convert an exception to the error that the client receives. An unexpected one is logged, and not shown."""
    match error:
        case ApiError():
            return error
        case ParameterError(param=param, message=message):
            return bad_parameter(param, message)
        case EngineNotReadyError():
            return stopping()  # `Service.ready` was checked first, so the engine has begun to stop since
        case EngineRestartingError(retry_after=seconds):
            return engine_restarting(seconds, cut=True)
        case EngineDeadError():
            return engine_dead()
        case HTTPException():
            return _routing_error(error)
        case RequestValidationError():
            return _validation_error(error)
        case RecursionError():  # whatever was recursing, it was over what the client sent
            return ApiError(400, "The request is nested too deeply.", code="invalid_json")
    logger.error("request %s failed", request_id, exc_info=error)
    return internal(request_id)


def parameter_name(location: tuple[str | int, ...]) -> str:
    """Convert ("messages", 0, "content") to messages[0].content."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _routing_error(error: HTTPException) -> ApiError:
    if error.status_code == 400 and error.__cause__ is not None:
        return _unreadable(error.__cause__)
    if error.status_code == 404:
        return unknown_url()
    if error.status_code == 405:
        return ApiError(405, "This URL does not take this method.", code="method_not_allowed")
    if error.status_code == 413:
        return ApiError(413, error.detail, code="body_too_large")
    if error.status_code == 429:
        return bodies_full(error.detail)
    message = error.detail or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, message, type=INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR)


def _unreadable(cause: BaseException) -> ApiError:
    """Convert what FastAPI says of a body that json cannot read, though not for its syntax."""
    match cause:
        case UnicodeDecodeError():
            reason = "it is not UTF-8"
        case RecursionError():
            reason = "it is nested too deeply"
        case ValueError():  # the only other that `json` raises: an integer that Python refuses to read
            reason = "it has an integer of thousands of digits"
        case _:
            reason = str(cause)
    return ApiError(400, f"The request's body is not valid JSON: {reason}.", code="invalid_json")


def _validation_error(error: RequestValidationError) -> ApiError:
    """Convert the first error that pydantic found, with the parameter's name and what is expected."""
    first: dict[str, Any] = error.errors()[0]
    kind, value, context = first["type"], first.get("input"), first.get("ctx", {})
    location = tuple(part for part in first["loc"] if part != "body")
    param = parameter_name(location)
    if kind == "json_invalid":
        reason = context.get("error", "")
        return ApiError(400, f"The request's body is not valid JSON: {reason}.", code="invalid_json")
    if kind == "string_unicode" and not location:
        return bad_parameter(str(value), f"{shown(value)} is not a valid name: it has a lone surrogate")
    if not location:
        return ApiError(400, "The request needs a body that is a JSON object, sent as Content-Type: application/json.")
    match kind:
        case "missing":
            return bad_parameter(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
        case "greater_than_equal":
            return bad_parameter(param, f"{param} is {shown(value)}, but must be at least {context['ge']}")
        case "greater_than":
            return bad_parameter(param, f"{param} is {shown(value)}, but must be more than {context['gt']:g}")
        case "less_than_equal":
            return bad_parameter(param, f"{param} is {shown(value)}, but must be at most {context['le']}")
        case "too_short":
            return bad_parameter(param, f"{param} is empty, but must have at least {context['min_length']} item")
        case "too_long":
            return bad_parameter(param, f"{param} is too long: it may have at most {context['max_length']} items")
        case "unsupported_parameter":
            return bad_parameter(param, f"{param} {first['msg']}", "unsupported_parameter")
        case "invalid_parameter":
            return bad_parameter(param, f"{param} {first['msg']}")
    wanted = f"must be {WANTED[kind]}" if kind in WANTED else first["msg"].removeprefix("Input ")
    given = "null" if value is None else shown(value)
    return bad_parameter(param, f"{param} is {given}, but {wanted}", "invalid_type")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
