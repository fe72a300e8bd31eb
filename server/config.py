"""ServerConfig: every setting of the HTTP server, one schema for flags, YAML and code. The engine's are in
`engine.config`. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from pilotfish.engine.config import NotNegative, Positive
from pilotfish.errors import ConfigError
from pilotfish.logs import LogFormat, LogLevel


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engine is served. Raises ConfigError from `check()`; msgspec raises ValidationError for wrong types."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0 for any that is free."""
    api_key: tuple[str, ...] = ()
    """A key that clients must send as "Authorization: Bearer KEY"; give it several times for several keys. The
    environment variable PILOTFISH_API_KEY is one more."""
    api_key_file: str | None = None
    """A file with more keys, one a line."""
    served_model_name: tuple[str, ...] = ()
    """What clients call the model, instead of its own name; give it several times for several names."""
    chat_template: str | None = None
    """A file with a jinja2 chat template to use instead of the model's own."""

    max_queue: NotNegative = 256
    """Most sequences that may wait beside the max_num_seqs that run; more are refused with status 429."""
    max_body_bytes: Positive = 8 * 2**20
    """Largest request body; a larger one is refused with status 413."""
    drain_timeout: Annotated[float, Meta(ge=0)] = 30.0
    """Seconds that running requests may take to finish after SIGTERM or Ctrl-C; those left then end with an error."""
    log_level: LogLevel = "info"
    """Least serious messages to log; info has a line for each request, but none for probes."""
    log_format: LogFormat = "text"
    """text, for people, or json, an object a line."""
    log_prompts: bool = False
    """Write prompts' texts into the log, with the request's line."""
    otlp_endpoint: str | None = None
    """Send a trace of each request to this OTLP receiver, such as http://127.0.0.1:4318. Needs pilotfish[otel]."""

    def check(self) -> ServerConfig:
        """Return self, or raise ConfigError for settings that cannot work."""
        for name, values in (("api_key", self.api_key), ("served_model_name", self.served_model_name)):
            if not all(value.strip() for value in values):
                raise ConfigError(f"{name} is empty: give it a value, or leave it out")
        self.keys()
        return self

    def keys(self) -> tuple[str, ...]:
        """All API keys, those of api_key_file as it is now included. Raises ConfigError for a file that cannot be read
        or has none: nobody means a server that is open to all by naming it."""
        if self.api_key_file is None:
            return self.api_key
        try:
            text = Path(self.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the keys in api_key_file {self.api_key_file}: {error}") from error
        keys = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not keys:
            raise ConfigError(f"api_key_file {self.api_key_file} has no keys: it must have one a line")
        return (*self.api_key, *keys)
