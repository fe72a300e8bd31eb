"""Errors in Anthropic's form."""

from __future__ import annotations

from pilotfish.server.errors import ApiError, ContextLengthError
from pilotfish.server.protocol.messages_out import MessagesError, MessagesErrorFields

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_error(error: ApiError) -> MessagesError:
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = default if error.code == "engine_dead" else _TYPES.get(error.status, default)  # waiting would not help
    message = error.message
    if isinstance(error, ContextLengthError):  # in Anthropic's words: agents find them, and shorten the conversation
        message = f"prompt is too long: {error.tokens} tokens > {error.limit - 1} maximum"
    elif error.param is not None and error.param not in message:  # this form has no field for it
        message = f"{error.param}: {message}"
    return MessagesError(MessagesErrorFields(kind, message), error.request_id)
