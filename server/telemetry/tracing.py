"""Switches tracing on where it is configured. The spans are made in `server.telemetry.spans`, which needs
the extra pilotfish[otel]; this module does not.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol
from urllib.parse import urlsplit

from starlette.types import Scope

from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACES_PATH = "/v1/traces"


class Tracing(Protocol):
    """Records requests as traces."""

    def record(self, scope: Scope, route: str, status: int, ended: float) -> str | None:
        """Record a request that was answered at `ended`, in time.monotonic() seconds. Returns the id of its trace; None
        if it is not sampled."""
        ...

    def close(self) -> None:
        """Send what has not been sent yet; this takes a few seconds at most."""
        ...


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing to an OTLP receiver: `endpoint`, or the one that OpenTelemetry's own variables name; None without either.

    Raises ConfigError for an endpoint that is not a URL, or if the extra is not installed; a variable alone, which may
    be meant for other programs, then only leads to a warning.
    """
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if endpoint is None and named is None:
        return None
    url = None if endpoint is None else traces_url(endpoint)
    try:
        from pilotfish.server.telemetry.spans import SpanTracing
    except ImportError as error:
        message = f"OpenTelemetry is not installed ({error}): pip install 'pilotfish[otel]'"
        if endpoint is not None:
            raise ConfigError(f"otlp_endpoint is set, but {message}") from error
        logger.warning("%s is set, but nothing is traced: %s", named, message)
        return None
    return SpanTracing(url)


def traces_url(endpoint: str) -> str:
    """The URL to send spans to, from an OTLP receiver's address as OTEL_EXPORTER_OTLP_ENDPOINT has it. Raises
    ConfigError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"otlp_endpoint is {endpoint!r}, but must be the URL of an OTLP receiver over HTTP, "
            "such as http://127.0.0.1:4318"
        )
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
