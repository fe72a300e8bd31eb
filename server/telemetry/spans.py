"""OpenTelemetry spans of requests, sent by OTLP over HTTP. Needs the extra pilotfish[otel].

Spans are made from recorded times once a request has been answered, so tracing does not slow down streams. Names and
attributes follow OpenTelemetry's semantic conventions for HTTP servers and for generative AI (gen_ai.*); others are
named pilotfish.*.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from starlette.datastructures import Headers
from starlette.types import Scope

from pilotfish import __version__
from pilotfish.server.auth import OPEN_PATHS
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.facts import GenerationFacts, facts_of
from pilotfish.server.telemetry.request_log import summary_of

FLUSH_MS = 3000
"""Maximum time for sending the last spans when the server ends."""

_SUMMARY = ("drafter", "drafted_tokens", "accepted_tokens", "cached_tokens", "queue_ms", "ttft_ms", "tokens_per_second")


class SpanTracing:
    """Tracing by OpenTelemetry (see `server.telemetry.tracing.Tracing`). `url` None: the variables OTEL_EXPORTER_OTLP_*
    set it; `exporter` replaces OTLP, for tests.

    OpenTelemetry's environment variables also set sampler, resource, batches, headers and propagators.
    """

    def __init__(self, url: str | None = None, exporter: SpanExporter | None = None) -> None:
        own = {SERVICE_VERSION: __version__}
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            own[SERVICE_NAME] = "pilotfish"
        self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("pilotfish", __version__)

    def record(self, scope: Scope, route: str, status: int, ended: float) -> str | None:
        if scope["path"] in OPEN_PATHS:
            return None
        clock, facts = _clock(), facts_of(scope)
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            context=extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            start_time=clock(facts.arrival),
            attributes=_http_attributes(scope, route, status),
        )
        if span.is_recording():
            if facts.generation is not None:
                span.set_attributes(_generation_attributes(facts.generation))
                for answer in facts.generation.answers:
                    _answer_spans(self._tracer, span, answer, clock)
            error = facts.error or (str(status) if status >= 500 else None)
            if error is not None:
                span.set_attribute("error.type", error)
            if status >= 500 or (error is not None and status < 400):
                span.set_status(Status(StatusCode.ERROR, error))
        span.end(clock(ended))
        context = span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def close(self) -> None:
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def _clock() -> Callable[[float], int]:
    """Return a function from time.monotonic() seconds to nanoseconds since 1970."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda seconds: int(seconds * 1e9) + offset


def _answer_spans(tracer: Tracer, parent: Span, answer: Answer, clock: Callable[[float], int]) -> None:
    """Make the spans queue, prefill and decode, as far as the answer got."""
    arrival, last = answer.request.arrival, answer.last_token
    stages: list[tuple[str, float, float, dict[str, int]]] = []
    if answer.scheduled is not None:
        stages.append(("queue", arrival, answer.scheduled, {}))
        if answer.first_token is not None:
            read = len(answer.request.prompt_ids) - answer.cached_tokens
            stages.append(("prefill", answer.scheduled, answer.first_token, {"pilotfish.prompt_tokens": read}))
            stages.append(("decode", answer.first_token, last, {"pilotfish.tokens": answer.tokens}))
    for name, start, end, attributes in stages:
        span = tracer.start_span(
            name,
            context=set_span_in_context(parent),
            start_time=clock(start),
            attributes={"pilotfish.answer": answer.index, **attributes},
        )
        span.end(clock(max(start, end)))


def _http_attributes(scope: Scope, route: str, status: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": route,
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "http.response.status_code": status,
        "pilotfish.request_id": facts_of(scope).request_id,
    }
    if (session := facts_of(scope).session) is not None:
        attributes["session.id"] = session
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    return attributes


def _generation_attributes(generation: GenerationFacts) -> dict[str, Any]:
    summary, spec = summary_of(generation), generation.spec
    params = generation.answers[0].request.params
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": generation.operation,
        "gen_ai.provider.name": "pilotfish",
        "gen_ai.request.model": spec.model,
        "gen_ai.response.model": spec.model,
        "gen_ai.response.id": generation.id,
        "gen_ai.request.choice.count": len(generation.answers),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.seed": spec.params.seed,  # the client's; that of `params` may be drawn
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.usage.input_tokens": summary["prompt_tokens"],
        "gen_ai.usage.output_tokens": summary["tokens"],
        "gen_ai.response.finish_reasons": [answer.end for answer in generation.answers],
    }
    attributes |= {f"pilotfish.{name}": summary[name] for name in _SUMMARY}
    return {name: value for name, value in attributes.items() if value is not None}
