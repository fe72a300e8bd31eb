"""Enables tracing if it is configured. `server.telemetry.spans` makes the spans and needs the extra pilotfish[otel];
this module does not.
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
        """Record a request that was answered at `ended`, in time.monotonic() seconds. Returns the id of its trace, or
        None if it is not sampled."""
        ...

    def close(self) -> None:
        """Send the remaining spans; this takes a few seconds at most."""
        ...


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Start tracing to the OTLP receiver `endpoint`, or to the one that OpenTelemetry's variables name; None without
    either.

    Raises ConfigError for an endpoint that is not a URL, or if the extra is not installed. If only a variable names the
    receiver, it may be meant for other programs, so a missing extra is just a warning.
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
    """Return the URL for spans at an OTLP receiver, given as for OTEL_EXPORTER_OTLP_ENDPOINT. Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.netloc)
    except ValueError:  # such as "http://[::1"
        valid = False
    if not valid:
        raise ConfigError(
            f"otlp_endpoint is {endpoint!r}, but must be the URL of an OTLP receiver over HTTP, "
            "such as http://127.0.0.1:4318"
        )
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
