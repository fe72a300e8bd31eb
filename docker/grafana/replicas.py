"""The row *Replicas* of the dashboard Service: a line for each of the selected servers."""

from __future__ import annotations

from panels import Panel, Query, Row

NO_SERVER = "No server in this time range"


def _line(
    title: str, description: str, unit: str, expression: str, empty: str = NO_SERVER, maximum: float | None = None
) -> Panel:
    return Panel(title, description, unit, (Query(expression, "{{instance}}"),), empty, maximum=maximum)


_HITS, _QUERIES = (
    f"sum by (instance) (rate(pilotfish_prefix_cache_{part}_tokens_total{{$i}}[$__rate_interval]))"
    for part in ("hit", "queried")
)

REPLICAS = Row(
    "Replicas",
    (
        _line(
            "Generated tokens by replica",
            "Whether a router gives them equal work. A replica that drains goes down to nothing.",
            "short",
            "sum by (instance) (rate(pilotfish_generated_tokens_total{$i}[$__rate_interval]))",
        ),
        _line(
            "Sequences by replica",
            "Running and waiting ones. One that grows while others do not has been given more than it can do.",
            "short",
            "sum by (instance) (pilotfish_sequences_running{$i} + pilotfish_sequences_waiting{$i})",
        ),
        _line(
            "Prompt tokens from the prefix cache by replica",
            "Share of the prompts' tokens that were found. It is what routing that knows the caches is for.",
            "percentunit",
            f"{_HITS} / ({_QUERIES} > 0)",
            "No prompts in this time range",
            maximum=1.0,
        ),
        _line(
            "KV cache by replica",
            "Share of the blocks that sequences hold.",
            "percentunit",
            "sum by (instance) (pilotfish_kv_cache_usage_ratio{$i})",
            maximum=1.0,
        ),
        _line(
            "Time to the first token by replica",
            "The 95th percentile, for each.",
            "s",
            "histogram_quantile(0.95, sum by (instance, le) "
            "(rate(pilotfish_time_to_first_token_seconds_bucket{$i}[$__rate_interval])))",
            "No answers in this time range",
        ),
        _line(
            "In rotation",
            "1 while a replica takes requests and does not drain, else 0.",
            "short",
            "sum by (instance) (pilotfish_engine_up{$i} > bool pilotfish_draining{$i})",
            maximum=1.0,
        ),
    ),
)
