"""Metrics by vLLM's names: the values of Pilotfish's own, as routers and benchmarks read them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pilotfish.server.metrics import POSITIONS, Metrics
from tests.server.test_metrics import info, stats

LABELS = {"model_name": "tiny", "engine": "0"}


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    found = [sample for family in families for sample in family.samples]
    assert len({(s.name, frozenset(s.labels.items())) for s in found}) == len(found)
    return {(s.name, frozenset(s.labels.items())): s.value for s in found}


def theirs(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"vllm:{name}", frozenset((LABELS | labels).items())]


def test_gauges_counters_and_histograms_are_pilotfishs_own() -> None:
    metrics = Metrics("tiny")
    metrics.ready(info())
    for _ in range(3):
        metrics.step(stats(running=2, waiting=5, prefix_queried_tokens=40, prefix_hit_tokens=32, preemptions=1))
    metrics.first_token(0.2, 0.1)
    metrics.inter_token(0.06, 2)
    metrics.ended("stop", 1.5, 20.0, prompt_tokens=40, tokens=12)
    metrics.refused()
    expected = {
        "num_requests_running": 2, "num_requests_waiting": 5, "kv_cache_usage_perc": 0.3, "gpu_cache_usage_perc": 0.3,
        "prefix_cache_queries_total": 120, "prefix_cache_hits_total": 96, "gpu_prefix_cache_queries_total": 120,
        "prompt_tokens_total": 120, "generation_tokens_total": 15, "num_preemptions_total": 3,
        "time_to_first_token_seconds_sum": 0.2, "inter_token_latency_seconds_count": 2,
        "time_per_output_token_seconds_count": 2, "e2e_request_latency_seconds_sum": 1.5,
        "request_queue_time_seconds_sum": 0.1, "request_prompt_tokens_sum": 40, "request_generation_tokens_sum": 12,
    }  # fmt: skip
    assert {name: theirs(metrics, name) for name in expected} == expected
    assert theirs(metrics, "cache_config_info", block_size="16", num_gpu_blocks="8") == 1
    assert theirs(metrics, "request_success_total", finished_reason="stop") == 1
    assert theirs(metrics, "time_to_first_token_seconds_bucket", le="0.25") == 1
    reasons = {dict(labels).get("finished_reason") for name, labels in samples(metrics) if "success" in name}
    assert reasons == {"stop", "length", "abort", "error"}


def test_drafts_are_counted_over_all_drafters() -> None:
    """A draft is what reaches the first position; vLLM counts positions from 0."""
    metrics = Metrics("tiny")
    metrics.ready(info())
    step = stats(
        drafted={"ngram": 25, "suffix": 3}, accepted={"ngram": 20, "suffix": 2},
        drafted_at={"ngram": (2, *(1,) * 23), "suffix": (1, 1, 1)},
        accepted_at={"ngram": (2, *(1,) * 18), "suffix": (1, 1)},
    )  # fmt: skip
    for _ in range(2):
        metrics.step(step)
    drafts = {name: theirs(metrics, f"spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens")}
    assert drafts == {"drafts": 6, "draft_tokens": 56}
    assert theirs(metrics, "spec_decode_num_accepted_tokens_total") == 44
    by_position = [
        theirs(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(POSITIONS)
    ]
    assert by_position == [6, 4, *(2,) * 14]


def test_they_are_there_only_where_asked_for_and_once_the_model_is_loaded() -> None:
    for metrics in (Metrics(), Metrics("tiny")):
        assert "vllm:" not in metrics.render().decode()
    metrics = Metrics()
    metrics.ready(info())
    assert "vllm:" not in metrics.render().decode()
    assert samples(metrics)["pilotfish_kv_cache_usage_ratio", frozenset()] == 0
