"""The metrics that vLLM has, too, by vLLM's names (those of its vllm/v1/metrics, and older ones that routers
still ask for): views of Pilotfish's own, made at each scrape. `--vllm-metrics` turns them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

OWN, THEIRS = "pilotfish_", "vllm:"
ENGINE = "0"
"""vLLM's label of the engine among those of a server."""

_RENAMED: tuple[tuple[str, str], ...] = (
    ("sequences_running", "num_requests_running"),
    ("sequences_waiting", "num_requests_waiting"),
    ("kv_cache_usage_ratio", "kv_cache_usage_perc"),
    ("kv_cache_usage_ratio", "gpu_cache_usage_perc"),
    ("cache_config", "cache_config"),
    ("prefix_cache_queried_tokens", "prefix_cache_queries"),
    ("prefix_cache_hit_tokens", "prefix_cache_hits"),
    ("prefix_cache_queried_tokens", "gpu_prefix_cache_queries"),
    ("prefix_cache_hit_tokens", "gpu_prefix_cache_hits"),
    ("prefix_cache_queried_tokens", "prompt_tokens"),
    ("generated_tokens", "generation_tokens"),
    ("preemptions", "num_preemptions"),
    ("time_to_first_token_seconds", "time_to_first_token_seconds"),
    ("inter_token_latency_seconds", "inter_token_latency_seconds"),
    ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    ("request_duration_seconds", "e2e_request_latency_seconds"),
    ("request_queue_seconds", "request_queue_time_seconds"),
    ("request_prompt_tokens", "request_prompt_tokens"),
    ("request_generated_tokens", "request_generation_tokens"),
)
"""Metrics without labels of their own, and vLLM's names for them."""


class VllmNames(Collector):
    """`own` returns Pilotfish's metrics, `model` is the model's name for clients."""

    def __init__(self, own: Callable[[], Iterable[Metric]], model: str) -> None:
        self._own = own
        self._labels = {"model_name": model, "engine": ENGINE}

    def collect(self) -> Iterator[Metric]:
        labels = self._labels
        own = {metric.name.removeprefix(OWN): metric for metric in self._own()}
        for name, theirs in _RENAMED:
            yield _renamed(own[name], THEIRS + theirs, labels)
        yield _counter(
            "request_success",
            "Answers by how they ended.",
            labels,
            {s.labels["outcome"]: s.value for s in _totals(own["requests"]) if s.labels["outcome"] != "refused"},
            "finished_reason",
        )
        yield from _speculation(own, labels)


def _speculation(own: dict[str, Metric], labels: dict[str, str]) -> Iterator[Metric]:
    """The counters of all drafters together."""
    drafted, accepted = (_by_position(own[f"position_{what}_tokens"]) for what in ("drafted", "accepted"))
    for name, what, value in (
        ("num_drafts", "Drafts that were verified.", drafted.get(1, 0.0)),
        ("num_draft_tokens", "Drafted tokens that were verified.", _sum(own["drafted_tokens"])),
        ("num_accepted_tokens", "Drafted tokens that were accepted.", _sum(own["accepted_tokens"])),
    ):
        yield _counter(f"spec_decode_{name}", what, labels, {"": value})
    yield _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens that were accepted, by their position in the draft, from 0.",
        labels,
        {str(position - 1): value for position, value in sorted(accepted.items())},
        "position",
    )


def _renamed(metric: Metric, name: str, labels: dict[str, str]) -> Metric:
    same = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        same.samples.append(sample._replace(name=name + suffix, labels=labels | sample.labels))
    return same


def _counter(name: str, what: str, labels: dict[str, str], values: dict[str, float], label: str = "") -> Metric:
    """Make a counter with a value for each value of `label`, or a single one if that is ""."""
    made = Metric(THEIRS + name, what, "counter")
    for value, count in values.items():
        own = labels | {label: value} if label else labels
        made.samples.append(Sample(f"{THEIRS}{name}_total", own, count))
    return made


def _totals(metric: Metric) -> list[Sample]:
    return [sample for sample in metric.samples if sample.name.endswith("_total")]


def _sum(metric: Metric) -> float:
    return sum(sample.value for sample in _totals(metric))


def _by_position(metric: Metric) -> dict[int, float]:
    """Add up drafters, by the positions that have a label of their own."""
    sums: dict[int, float] = {}
    for sample in _totals(metric):
        if (position := sample.labels["position"]).isdecimal():
            sums[int(position)] = sums.get(int(position), 0.0) + sample.value
    return sums
