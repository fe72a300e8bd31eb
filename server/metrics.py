"""Prometheus metrics, `pilotfish_*`, in base units. Labels have few values: outcomes, drafters, phases.

Counters and gauges come from the engine's steps. The histograms of latencies are taken here, where a client's
chunks are written: from the request's arrival at this server, and with the way between the processes.
"""

from __future__ import annotations

import time
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.process_collector import ProcessCollector

from engine.messages import StepStats
from engine.request import EngineInfo

Outcome = Literal["stop", "length", "abort", "error", "refused"]

PHASES = ("plan", "draft", "forward", "sample", "commit")

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_ITL_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 1, 2, 5, 10, 30, 60),
)
_STEP_SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PER_SECOND = (1, 2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = self.registry = registry if registry is not None else CollectorRegistry()
        ProcessCollector(registry=registry)
        self.last_step = 0.0
        """time.monotonic() when the engine last told of a step."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"pilotfish_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"pilotfish_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"pilotfish_{name}", text, labels, registry=registry, buckets=buckets)

        self._info = Info("pilotfish_engine", "The model that is served and how it runs.", registry=registry)

        self._decode_rate = histogram(
            "request_decode_tokens_per_second", "Tokens of an answer after its first, by the time from it.", _PER_SECOND
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to an answer's first token (TTFT).", _SECONDS
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Between the tokens of an answer (ITL). Tokens that a step brings together share the time since the step "
            "before, each with an equal part; every token after the first counts once.",
            _ITL_SECONDS,
        )
        self._end_to_end = histogram(
            "request_duration_seconds", "From a request's arrival to an answer's end.", _SECONDS
        )
        self._queue = histogram("request_queue_seconds", "From a request's arrival to its first step.", _SECONDS)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed (not those from the prefix cache).")
        self._generated_tokens = counter("generated_tokens", "Tokens generated.")
        self._drafted = counter("drafted_tokens", "Drafted tokens that the target verified.", "drafter")
        self._accepted = counter("accepted_tokens", "Drafted tokens that the target agreed with.", "drafter")
        requests = counter(
            "requests",
            "Answers by how they ended; a stop string is a stop, a client that left an abort. A refused request is "
            "one that was answered with an error before it was given to the engine.",
            "outcome",
        )
        self._outcomes = {outcome: requests.labels(outcome) for outcome in get_args(Outcome)}
        self._queried = counter("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.")
        self._preemptions = counter("preemptions", "Sequences that lost their memory to an older one for a while.")
        self._steps = counter("engine_steps", "Steps of the engine.")
        self._rows = counter("engine_step_rows", "Token rows that the target computed.")

        self._running = gauge("sequences_running", "Sequences that the engine decodes or prefills.")
        self._waiting = gauge("sequences_waiting", "Sequences that wait for the engine.")
        self._blocks_used = gauge("kv_blocks_used", "KV-cache blocks that sequences hold.")
        self._blocks_cached = gauge("kv_blocks_cached", "KV-cache blocks that only the prefix cache keeps.")
        self._blocks_total = gauge("kv_blocks_total", "KV-cache blocks that there are.")

        phases = histogram("step_phase_seconds", "Time of a step, by its phases.", _STEP_SECONDS, "phase")
        self._phases = {phase: phases.labels(phase) for phase in PHASES}

    def ready(self, info: EngineInfo) -> None:
        """Note what the engine says of itself."""
        named = {"model": info.model, "dtype": info.dtype, "device": info.device, "kernels": info.kernels}
        self._info.info(named | {"drafter": info.default_drafter})
        self._blocks_total.set(info.num_blocks)
        for drafter in info.drafters:
            self._drafted.labels(drafter)
            self._accepted.labels(drafter)

    def step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self.last_step = time.monotonic()
        self._steps.inc()
        self._rows.inc(stats.rows)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        for counters, counts in ((self._drafted, stats.drafted), (self._accepted, stats.accepted)):
            for drafter, count in counts.items():
                counters.labels(drafter).inc(count)
        self._preemptions.inc(stats.preemptions)
        self._queried.inc(stats.prefix_queried_tokens)
        self._hits.inc(stats.prefix_hit_tokens)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_cached.set(stats.blocks_cached)
        self._blocks_total.set(stats.blocks_total)
        for phase, seconds in stats.seconds.items():
            if (histogram := self._phases.get(phase)) is not None:
                histogram.observe(seconds)

    def engine_gone(self) -> None:
        """An engine that has ended holds nothing."""
        for gauge in (self._running, self._waiting, self._blocks_used, self._blocks_cached, self._blocks_total):
            gauge.set(0)

    def first_token(self, ttft: float, queued: float) -> None:
        """An answer has its first token: seconds since the request's arrival, and those of them in the queue."""
        self._first_token.observe(ttft)
        self._queue.observe(queued)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """`tokens` came `seconds` after those before them."""
        each = seconds / tokens
        for _ in range(tokens):
            self._inter_token.observe(each)

    def ended(self, outcome: Outcome, duration: float, decode_rate: float | None) -> None:
        """An answer has ended, `duration` seconds after its request's arrival."""
        self._outcomes[outcome].inc()
        if outcome in ("stop", "length"):
            self._end_to_end.observe(duration)
            if decode_rate is not None:
                self._decode_rate.observe(decode_rate)

    def refused(self) -> None:
        """A request was answered with an error instead of being given to the engine."""
        self._outcomes["refused"].inc()

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
