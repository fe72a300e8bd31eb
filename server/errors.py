"""The API's errors: `ApiError` is what a route raises, `as_api_error` turns every other exception into one, and an
`ErrorForm` is the JSON that it becomes. A client learns nothing of an internal error but the id to look for in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pilotfish.errors import EngineDeadError, EngineNotReadyError, ParameterError
from pilotfish.server.encoding import json_response

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

LOADING_RETRY_SECONDS = 2
STOPPING_RETRY_SECONDS = 10
QUEUE_RETRY_SECONDS = 1


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """An error as OpenAI sends it."""

    error: ErrorFields


class ApiError(Exception):
    """A response other than 200. `retry_after` is in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param = _encodable(message), None if param is None else _encodable(param)
        self.status, self.type, self.code, self.retry_after = status, type, code, retry_after

    def response(self, form: ErrorForm) -> Response:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return json_response(form(self), self.status, headers)


def _encodable(text: str) -> str:
    """`text` with its lone surrogates, which a quoted request may have and UTF-8 cannot carry, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


ErrorForm = Callable[[ApiError], msgspec.Struct]
"""Makes the JSON object that a client is sent for an error."""


def openai_error(error: ApiError) -> ErrorBody:
    return ErrorBody(ErrorFields(error.message, error.type, error.param, error.code))


def bad_parameter(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str, served: tuple[str, ...]) -> ApiError:
    known = " or ".join(repr(known) for known in served)
    return ApiError(
        404, f"The model {name!r} does not exist: this server serves {known}.", param="model", code="model_not_found"
    )


def loading() -> ApiError:
    return ApiError(
        503,
        "The model is still loading: try again shortly, or wait until /ready returns 200.",
        type=SERVER_ERROR,
        code="model_loading",
        retry_after=LOADING_RETRY_SECONDS,
    )


def stopping(message: str = "The server is stopping.") -> ApiError:
    return ApiError(503, message, type=SERVER_ERROR, code="server_stopping", retry_after=STOPPING_RETRY_SECONDS)


def cut_short() -> ApiError:
    return stopping("The server is stopping and ended this answer before it was complete.")


def queue_full(in_flight: int, limit: int) -> ApiError:
    return ApiError(
        429,
        f"The queue is full: {in_flight} of at most {limit} sequences are in flight. Try again later.",
        type="rate_limit_error",
        code="queue_full",
        retry_after=QUEUE_RETRY_SECONDS,
    )


def engine_dead(reason: str | None = None) -> ApiError:
    because = f": {reason}" if reason else ""
    message = f"The engine has ended{because}; the server must be restarted."
    return ApiError(503, message, type=SERVER_ERROR, code="engine_dead")


def internal(request_id: str) -> ApiError:
    message = f"The server had an error while processing your request. Look for request id {request_id} in its log."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The error that a client is told of; one that it must not see is logged."""
    match error:
        case ApiError():
            return error
        case ParameterError(param=param, message=message):
            return bad_parameter(param, message)
        case EngineNotReadyError():
            return stopping()  # routes ask `Service.ready` first: what was ready then can only have begun to stop
        case EngineDeadError():
            return engine_dead(str(error))
        case HTTPException():
            return _routing_error(error)
        case RequestValidationError():
            return _validation_error(error)
    logger.error("request %s failed", request_id, exc_info=error)
    return internal(request_id)


def parameter_name(location: tuple[str | int, ...]) -> str:
    """Spells ("messages", 0, "content") as clients write it: messages[0].content."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _routing_error(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(
            404, "Unknown request URL: see the server's /docs for the endpoints that exist.", code="unknown_url"
        )
    if error.status_code == 405:
        return ApiError(405, "This URL does not take this method.", code="method_not_allowed")
    if error.status_code == 413:
        return ApiError(413, error.detail, code="body_too_large")
    message = error.detail or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, message, type=INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first error that pydantic found, with the parameter's name and what would be right."""
    first: dict[str, Any] = error.errors()[0]
    kind, value, context = first["type"], first.get("input"), first.get("ctx", {})
    location = tuple(part for part in first["loc"] if part != "body")
    param = parameter_name(location)
    if kind == "json_invalid":
        reason = context.get("error", "")
        return ApiError(400, f"The request's body is not valid JSON: {reason}.", code="invalid_json")
    if not location:
        return ApiError(400, "The request needs a body that is a JSON object, sent as Content-Type: application/json.")
    match kind:
        case "missing":
            return bad_parameter(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
        case "extra_forbidden":
            return bad_parameter(param, f"Unrecognized request argument supplied: {param}", "unknown_parameter")
        case "greater_than_equal":
            return bad_parameter(param, f"{param} is {value!r}, but must be at least {context['ge']}")
        case "less_than_equal":
            return bad_parameter(param, f"{param} is {value!r}, but must be at most {context['le']}")
        case "unsupported_parameter":
            return bad_parameter(param, f"{param} {first['msg']}", "unsupported_parameter")
        case "invalid_parameter":
            return bad_parameter(param, f"{param} {first['msg']}")
    wanted = first["msg"].removeprefix("Input ")
    return bad_parameter(param, f"{param} is {_shortened(value)}, but {wanted}", "invalid_type")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
