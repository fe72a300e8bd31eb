"""Facts about an HTTP request, collected while it is handled, for the log, traces and metrics after the response."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Scope

from pilotfish.server.errors import ApiError, ErrorForm, as_api_error, openai_error
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.spec import GenerationSpec
from pilotfish.server.tenants import ApiKey

_KEY = "facts"


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """The facts of a request that was sent to the engine, for log, traces and metrics."""

    id: str
    """The response's id."""
    operation: str
    """OpenTelemetry's gen_ai.operation.name of the endpoint, such as "chat"."""
    spec: GenerationSpec
    answers: Sequence[Answer]
    prompts: Sequence[str] | None = None
    """The text of the prompts, if it may be logged."""


@dataclass(slots=True)
class RequestFacts:
    """Facts about one request, which `RequestContext` stores in the scope's state."""

    request_id: str
    session: str | None = None
    """The client's name for the session that the request is part of, from its header."""
    arrival: float = field(default_factory=time.monotonic)
    """time.monotonic() seconds."""
    tenant: str = ""
    """Whose request it is (see `server.tenants`); "" if all are of one tenant."""
    key: ApiKey | None = None
    """The API key that was sent, where one is needed."""
    body_bytes: int = 0
    """Bytes of the body that were read, decompressed."""
    ignored: tuple[str, ...] = ()
    """Names of fields of the request that are not known, and were ignored."""
    error_form: ErrorForm = openai_error
    """The form of the endpoint's errors."""
    error: str | None = None
    """The code of the error that was the response, or ended the stream."""
    generation: GenerationFacts | None = None
    """None unless the request was sent to the engine."""

    def failed(self, error: Exception) -> ApiError:
        """Record an error, and return it as the client receives it."""
        known = as_api_error(error, self.request_id)
        self.error, known.request_id = known.code, self.request_id
        return known

    def error_response(self, error: Exception) -> Response:
        """Record an error, and return the response in the endpoint's form."""
        return self.failed(error).response(self.error_form)

    def put_into(self, scope: Scope) -> None:
        scope.setdefault("state", {})[_KEY] = self


def facts_of(scope: Scope) -> RequestFacts:
    facts: RequestFacts = scope["state"][_KEY]
    return facts
