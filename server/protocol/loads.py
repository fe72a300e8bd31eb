"""The response of GET /v1/loads, in SGLang's form."""

from __future__ import annotations

import msgspec


class Speculative(msgspec.Struct):
    """Of the last seconds."""

    accept_length: float
    """Mean tokens of a verified draft, with the target's own after it; 0 without drafts."""
    accept_rate: float
    """Share of the drafted tokens that were accepted."""


class Load(msgspec.Struct, kw_only=True):
    """The load of an engine: of a data-parallel rank, as SGLang calls it, of which a server here has one."""

    dp_rank: int = 0
    num_running_reqs: int
    num_waiting_reqs: int
    """Sequences that were admitted and are not running: those that wait for the engine, and those that are being
    prepared."""
    num_total_reqs: int
    num_used_tokens: int
    """Of the KV cache, in whole blocks: those that sequences hold, not those that only the prefix cache keeps."""
    max_total_num_tokens: int
    token_usage: float
    """`num_used_tokens` by `max_total_num_tokens`."""
    gen_throughput: float
    """Tokens generated a second, in the last seconds."""
    cache_hit_rate: float
    """Share of the prompt tokens of the last seconds that were found in the prefix cache."""
    utilization: float
    """Running sequences by `max_running_requests`."""
    max_running_requests: int
    speculative: Speculative


class AggregateLoad(msgspec.Struct, kw_only=True):
    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int
    avg_token_usage: float
    avg_throughput: float
    avg_utilization: float


class Loads(msgspec.Struct, kw_only=True):
    timestamp: str
    """ISO 8601, UTC."""
    version: str
    dp_rank_count: int = 1
    loads: list[Load]
    aggregate: AggregateLoad
