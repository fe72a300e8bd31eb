"""Logging of all processes: one line for each message, to standard error, as text or as JSON.

A message may have fields: `logger.info("...", extra=fields(request_id=..., tokens=...))`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_FIELDS = "fields"


class Logs(msgspec.Struct, frozen=True, kw_only=True):
    """How a process logs."""

    format: LogFormat = "text"
    level: LogLevel = "info"


def configure(logs: Logs) -> None:
    """Configure the root logger, warnings included. A root logger that has handlers already is left as it is."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if logs.format == "json" else TextFormatter())
    logging.basicConfig(level=logs.level.upper(), handlers=[handler])
    logging.captureWarnings(True)


def current() -> Logs:
    """Return how this process logs, for a process that it starts."""
    root = logging.getLogger()
    json_lines = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    levels: tuple[LogLevel, ...] = ("debug", "info", "warning")
    enabled = (name for name in levels if root.isEnabledFor(logging.getLevelName(name.upper())))
    return Logs(format="json" if json_lines else "text", level=next(enabled, "error"))


def fields(**values: Any) -> dict[str, Any]:
    """Return the `extra` of a message with these fields, without those that are None."""
    return {_FIELDS: {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    """Formats time, level, logger, message, and the fields as name=value, quoted where needed."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        own = getattr(record, _FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{name}={_value(value)}" for name, value in own.items())])


class JsonFormatter(logging.Formatter):
    """Formats a JSON object a line: time (ISO 8601, UTC), level, logger, message, the fields, and any exception."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _value(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)
