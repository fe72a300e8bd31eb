"""ServerConfig: the HTTP server's settings, one schema for flags, YAML and code. Sizes are in bytes, times in seconds.
The engine's settings are in `engine.config`.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from pilotfish.engine.config import NotNegative, Positive
from pilotfish.errors import ConfigError
from pilotfish.logs import LogFormat, LogLevel
from pilotfish.server.keys import KeyRing

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


NO_ORIGINS = ("none",)
_WEB_ADDRESS = re.compile(r"https?://[^\s]+")
_ORIGIN = re.compile(r"\*|none|[a-z][a-z0-9+.-]*://[^/\s]+")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server's settings. Each field's docstring is the help text of its flag.

    `check` raises ConfigError; msgspec raises ValidationError for values of wrong types.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of the machine."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port to listen on; 0: any free port."""
    api_key: tuple[str, ...] = ()
    """API key that clients must send as "Authorization: Bearer KEY", given as KEY or NAME=KEY, where NAME is the tenant
    whose key it is. Repeatable; the environment variable PILOTFISH_API_KEY adds another."""
    api_key_file: str | None = None
    """File with more API keys, one per line, as KEY or NAME=KEY, the latter perhaps followed by its tenant's limits,
    such as weight=2 max_sequences=16 requests_per_minute=60 tokens_per_minute=100000. SIGHUP reads it again."""
    tenant_header: str | None = None
    """Header that names the tenant of requests whose API key has no name, such as X-Tenant. Only for a server behind a
    gateway that sets it. Tenants do not share prefixes or stored responses."""
    served_model_name: tuple[str, ...] = ()
    """Name of the model in the API, instead of its own. Repeatable."""
    chat_template: str | None = None
    """File with a Jinja2 chat template that replaces the model's own."""
    tool_call_parser: str = "auto"
    """Format of the model's tool calls, such as hermes, llama3_json or mistral; auto: found from the chat template;
    none: calls are text."""
    reasoning_parser: str = "auto"
    """Format of the model's reasoning, such as think or mistral; auto: found from the chat template; none: it is
    text."""

    cors_origins: tuple[str, ...] = ("*",)
    """Origin of web pages that may use the API, such as https://chat.example.com; "*": all, "none": none.
    Repeatable. Never with credentials."""
    page: bool = True
    """Serve a page for browsers at /: a chat, drafters side by side, the engine live, recent requests."""
    grafana_url: str | None = None
    """Address of a Grafana dashboard that the page links to, such as https://grafana.example.com/d/pilotfish."""
    response_store: str | None = None
    """File of an SQLite database for the responses of /v1/responses, which survives a restart; without it they are kept
    in memory."""
    response_store_size: NotNegative = 1000
    """Number of responses of /v1/responses that are kept, the newest; 0: none."""
    response_store_bytes: Positive = 256 * 2**20
    """Maximum size of the responses of /v1/responses that are kept, with all items before them; the oldest go first."""
    response_store_age: Annotated[float, Meta(gt=0)] = 86400.0
    """Seconds that a response of /v1/responses is kept."""
    max_queue: NotNegative = 256
    """Maximum number of waiting sequences, in addition to the max_num_seqs that run; more are refused with status
    429."""
    max_queue_ms: Annotated[float, Meta(ge=0)] = 0.0
    """Maximum milliseconds that a request may probably wait before it runs, as estimated from the requests before:
    those that would wait longer are refused with status 429 at once. 0: no limit."""
    max_queue_tokens: NotNegative = 0
    """Maximum number of tokens that the prompts and answers of all requests in flight may come to, counting max_tokens
    for an answer; more are refused with status 429. 0: no limit."""
    max_body_bytes: Positive = 8 * 2**20
    """Maximum size of a request body; larger ones are refused with status 413."""
    max_bodies_bytes: Positive = 256 * 2**20
    """Maximum size of the bodies of all requests in flight together; more are refused with status 429. At least one
    body of max_body_bytes is accepted."""
    max_connections: NotNegative = 0
    """Maximum number of connections at a time; more are refused with status 503. 0: as many as the limit on open files
    allows, which is the upper bound in any case."""
    client_timeout: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds that a client may take for the head of a request; for its body, in addition to a second for each 16 KiB;
    and for reading the next part of an answer, when it reads more slowly than the answer comes. Connections of slower
    clients are closed, their requests end."""
    strict_requests: bool = False
    """Refuse requests with fields that are not known, instead of ignoring these with a warning."""
    vllm_metrics: bool = False
    """Give out the metrics that vLLM has, too, also by vLLM's names (vllm:num_requests_running, ...), for routers and
    benchmarks that know no others."""
    drain_endpoint: bool = False
    """Let clients take this server out of a balancer's rotation and back, by POST and DELETE of /drain."""
    drain_timeout: Annotated[float, Meta(ge=0)] = 30.0
    """Seconds that running requests have to finish after SIGTERM or Ctrl-C; those that remain end with an error."""
    engine_restarts: NotNegative = 5
    """Maximum number of times that an engine which has died is started again within `engine_restart_window`; after more
    deaths /health is 503, so that whatever watches the server restarts it. 0: never start it again."""
    engine_restart_window: Annotated[float, Meta(gt=0)] = 600.0
    """Seconds for which a restart of the engine counts towards `engine_restarts`. The first restart is immediate, those
    that follow within this time wait 1, 2, 4 and so on up to 30 seconds."""
    log_level: LogLevel = "info"
    """Lowest level of messages to log. info logs a line for each request, but none for probes."""
    log_format: LogFormat = "text"
    """Format of the log. text: readable lines; json: one object per line."""
    log_prompts: bool = False
    """Log the text of the prompts with each request."""
    otlp_endpoint: str | None = None
    """Send a trace of each request to this OTLP receiver, such as http://127.0.0.1:4318. Needs pilotfish[otel]."""

    def check(self) -> ServerConfig:
        """Return self. Raises ConfigError for settings that cannot work."""
        for name, values in (("api_key", self.api_key), ("served_model_name", self.served_model_name)):
            if not all(value.strip() for value in values):
                raise ConfigError(f"{name} is empty: give it a value, or leave it out")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin) or (origin in ("*", "none") and len(self.cors_origins) > 1):
                raise ConfigError(
                    f"cors_origins has {origin!r}, but needs origins such as https://chat.example.com without a path, "
                    'or "*" or "none" alone'
                )
        if self.grafana_url is not None and not _WEB_ADDRESS.fullmatch(self.grafana_url):
            raise ConfigError(f"grafana_url is {self.grafana_url!r}, but must begin with http:// or https://")
        if self.tenant_header is not None and not _HEADER_NAME.fullmatch(self.tenant_header):
            raise ConfigError(f"tenant_header is {self.tenant_header!r}, but must be a header's name, such as X-Tenant")
        KeyRing(self.api_key, self.api_key_file)
        return self
