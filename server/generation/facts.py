"""The facts of an HTTP request: noted on its way, read by the log, traces and metrics once it has been answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from pilotfish.server.errors import ApiError, ErrorForm, openai_error
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.spec import GenerationSpec

_KEY = "facts"


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """A request that was given to the engine."""

    id: str
    """The response's id."""
    operation: str
    """OpenTelemetry's name for what the endpoint does, such as "chat"."""
    spec: GenerationSpec
    answers: Sequence[Answer]
    prompts: Sequence[str] | None = None
    """The prompts' texts, where they may be logged."""


@dataclass(slots=True)
class RequestFacts:
    """The facts of one request: `RequestContext` puts them into its scope's state."""

    request_id: str
    arrival: float = field(default_factory=time.monotonic)
    """time.monotonic() seconds."""
    error_form: ErrorForm = openai_error
    """The form in which the endpoint's clients expect an error."""
    error: str | None = None
    """The code of the error that was the answer, or that ended the stream."""
    generation: GenerationFacts | None = None
    """None unless the request was given to the engine."""

    def failed(self, error: ApiError) -> ApiError:
        """Notes the error that the client is told of, and returns it."""
        self.error = error.code
        return error

    def put_into(self, scope: Scope) -> None:
        scope.setdefault("state", {})[_KEY] = self


def facts_of(scope: Scope) -> RequestFacts:
    facts: RequestFacts = scope["state"][_KEY]
    return facts
