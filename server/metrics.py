"""Prometheus metrics, `pilotfish_*`, in base units; docs/metrics.md documents each. Labels have few values, never a
client's string: routes, statuses, outcomes, drafters, positions, phases.

Counters and gauges come from the engine's steps. Latencies are measured in this process, from the request's arrival, so
they include the communication with the engine process.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

from pilotfish import __version__
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.request import EngineInfo
from pilotfish.engine.stats import StepStats
from pilotfish.server.vllm_names import VllmNames

Outcome = Literal["stop", "length", "abort", "error", "refused"]

PHASES = ("plan", "draft", "forward", "sample", "commit")
NO_DRAFTER = "none"
MAX_TENANTS, OTHER_TENANTS = 100, "other"
"""Number of tenants with a label of their own, and the label of those beyond it."""
POSITIONS = 16
"""Number of draft positions with a label of their own; later ones share one."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_ITL_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 1, 2, 5, 10, 30, 60),
)
_STEP_SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PER_SECOND = (1, 2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_STEP_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 25, 33)

_STEP_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed (not those from the prefix cache)."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "preemptions": ("preemptions", "Sequences that lost their memory to one that comes before them for a while."),
    "pauses": ("pauses", "Sequences that waited, with their memory, for one that comes before them."),
    "prefix_queried_tokens": ("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
    "past_queries": ("suffix_memory_queries", "Sequences and steps for which past texts were searched."),
    "past_hits": ("suffix_memory_hits", "Those of them for which past texts had a draft."),
    "constrained_rows": ("constrained_rows", "Rows whose token a grammar or a budget of reasoning restricted."),
}
"""Fields of StepStats that are added to a counter, with its name and help text."""
_STEP_GAUGES = {
    "running": ("sequences_running", "Sequences that the engine decodes or prefills."),
    "waiting": ("sequences_waiting", "Sequences that wait for the engine."),
    "blocks_used": ("kv_blocks_used", "KV-cache blocks that sequences hold."),
    "blocks_cached": ("kv_blocks_cached", "KV-cache blocks that only the prefix cache keeps."),
    "blocks_total": ("kv_blocks_total", "KV-cache blocks in total."),
    "past_bytes": ("suffix_memory_bytes", "Bytes of past prompts and answers that are kept to draft from."),
}
"""Fields of StepStats that a gauge is set to, with its name and help text."""


class Metrics:
    """All metrics, in a registry of their own. `vllm_model`: the model's name for clients, with which those that vLLM
    has, too, are also given out by its names once the model is loaded."""

    def __init__(self, vllm_model: str | None = None) -> None:
        registry = self.registry = CollectorRegistry()
        disable_created_metrics()  # Prometheus makes no use of counters' creation times
        ProcessCollector(registry=registry)
        self.last_step = 0.0
        """time.monotonic() of the last report of a step."""
        self.now: StepStats | None = None
        """The last step of this engine."""
        self.watchers: list[Callable[[StepStats], None]] = []
        """Called with each step, too."""
        self._model = ""
        own: dict[str, Any] = {"namespace": "pilotfish", "registry": registry}
        counter: Callable[..., Counter] = partial(Counter, **own)
        gauge: Callable[..., Gauge] = partial(Gauge, **own)
        histogram: Callable[..., Histogram] = partial(Histogram, **own)
        versions = {"version": __version__, "python": platform.python_version(), "torch": version("torch")}
        Info("build", "Versions of Pilotfish, Python and torch.", **own).info(versions)

        self._info = Info("engine", "The model that is served and how it runs.", **own)
        self._cache_config = Info("cache_config", "The KV cache's blocks, with vLLM's labels.", **own)
        self._up = gauge("engine_up", "1 while the engine takes requests.")
        self._draining = gauge("draining", "1 while /ready sends balancers away, at the request of POST /drain.")
        self._restarts = counter("engine_restarts", "Times that the engine died and was started again.")
        self._replays = counter(
            "requests_replayed", "Answers that had not begun when the engine died, and were begun anew by the next."
        )
        self._load = gauge("engine_load_seconds", "Time that loading the model took.")
        self._memory = gauge(
            "rank_memory_bytes", "Memory of an engine process: resident, and allocated on its GPU.", ("rank", "kind")
        )
        self._max_sequences = gauge("sequences_max", "Maximum number of sequences that run at once.")
        self._blocks_free = gauge("kv_blocks_free", "KV-cache blocks with nothing in them.")
        self._usage = gauge("kv_cache_usage_ratio", "Share of the KV-cache blocks that sequences hold, from 0 to 1.")
        self._steps = counter("engine_steps", "Steps of the engine.")
        self._passes = counter(
            "passes",
            "Passes of the target: captured ones, or why none was replayed (no_graphs, adapters, size, logits).",
            ("how",),
        )
        self._drawn = counter(
            "drawn_rows",
            "Rows whose tokens the pass itself drew (pass), or why they were drawn after it.",
            ("where",),
        )
        self._step_counters = {field: counter(*described) for field, described in _STEP_COUNTERS.items()}
        self._step_gauges = {field: gauge(*described) for field, described in _STEP_GAUGES.items()}
        phases = histogram("step_phase_seconds", "Time of a step, by its phases.", ("phase",), buckets=_STEP_SECONDS)
        self._phases = {phase: phases.labels(phase) for phase in PHASES}
        self._sequences = histogram(
            "step_sequences", "Batch size: sequences that a step computed something for.", buckets=_SEQUENCES
        )
        self._rows = histogram("step_rows", "Token rows that the target computed in a step.", buckets=_ROWS)
        self._speculation = _Speculation(counter, histogram)

        self._http = counter(
            "http_requests",
            "HTTP responses by route and status; 'other' is every path that is no route.",
            ("route", "status"),
        )
        self._connections = gauge("connections", "Open connections of clients.")
        self._ended_connections = counter(
            "connections_ended",
            "Connections that were refused because there were too many (limit), or closed because the client was too "
            "slow with a request (head, body) or with reading an answer (answer).",
            ("reason",),
        )
        for reason in ("limit", "head", "body", "answer"):
            self._ended_connections.labels(reason)
        requests = counter(
            "requests",
            "Answers by how they ended; a stop string is a stop, a client that left an abort. A refused request was "
            "answered with an error before it was given to the engine.",
            ("outcome",),
        )
        self._outcomes = {outcome: requests.labels(outcome) for outcome in get_args(Outcome)}
        self._tenant_requests = counter(
            "tenant_requests", "Requests by the name of their API key: served, and refused by its limits.",
            ("tenant", "outcome"),
        )  # fmt: skip
        self._tenant_tokens = counter(
            "tenant_tokens", "Tokens of prompts and answers by the name of their API key.", ("tenant", "kind")
        )
        self._tenants: set[str] = set()
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to an answer's first token (TTFT).",
            buckets=_SECONDS,
        )  # fmt: skip
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Between the tokens of an answer (ITL). Tokens of one step share the time since the step before equally; "
            "every token after the first counts once.",
            buckets=_ITL_SECONDS,
        )
        self._end_to_end = histogram(
            "request_duration_seconds", "From a request's arrival to an answer's end.", buckets=_SECONDS
        )
        self._queue = histogram(
            "request_queue_seconds", "From a request's arrival to its first step.", buckets=_SECONDS
        )
        self._decode_rate = histogram(
            "request_decode_tokens_per_second",
            "Tokens of an answer after its first, by the time since it. By the drafter that drafted most for it.",
            ("model", "drafter"),
            buckets=_PER_SECOND,
        )
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of an answer's prompt.", buckets=_TOKENS)
        self._answer_length = histogram("request_generated_tokens", "Tokens of an answer.", buckets=_TOKENS)
        self._vllm = None if vllm_model is None else VllmNames(registry.collect, vllm_model)

    def ready(self, info: EngineInfo) -> None:
        """Record that the engine takes requests, and its info."""
        named = {"model": info.model, "dtype": info.dtype, "device": info.device, "kernels": info.kernels}
        numbers = {"max_model_len": info.max_model_len, "tensor_parallel_size": info.tensor_parallel_size}
        self._info.info(named | {"drafter": info.default_drafter} | {name: str(n) for name, n in numbers.items()})
        self._cache_config.info({"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks)})
        self._model = info.model
        self.now = None
        self.last_step = time.monotonic()  # what waits for a new engine has not been stuck before
        self._up.set(1)
        self._load.set(info.load_seconds)
        self._max_sequences.set(info.max_num_seqs)
        self._step_gauges["blocks_total"].set(info.num_blocks)
        self._blocks_free.set(info.num_blocks)
        self._note_memory(info.memory)
        self._speculation.begin(info.drafters)
        for drafter in (NO_DRAFTER, *info.drafters):
            self._decode_rate.labels(info.model, drafter)

    def step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self.last_step = time.monotonic()
        self.now = stats
        self._steps.inc()
        if stats.passed:
            self._passes.labels(stats.passed).inc()
        for where, rows in stats.drawn_rows.items():
            self._drawn.labels(where).inc(rows)
        for field, counter in self._step_counters.items():
            counter.inc(getattr(stats, field))
        for field, gauge in self._step_gauges.items():
            gauge.set(getattr(stats, field))
        self._blocks_free.set(stats.blocks_total - stats.blocks_used - stats.blocks_cached)
        self._usage.set(stats.blocks_used / max(1, stats.blocks_total))
        if stats.sequences:
            self._sequences.observe(stats.sequences)
            self._rows.observe(stats.rows)
        for phase, seconds in stats.seconds.items():
            if (histogram := self._phases.get(phase)) is not None:
                histogram.observe(seconds)
        self._note_memory(stats.memory)
        self._speculation.step(stats)
        for watch in self.watchers:
            watch(stats)

    def draining(self, on: bool) -> None:
        """Record whether balancers are sent away."""
        self._draining.set(on)

    def engine_stopping(self) -> None:
        """Record that the engine takes no more requests."""
        self._up.set(0)

    def restarting(self) -> None:
        """Count that the engine has died and is started again."""
        self._restarts.inc()
        self.engine_gone()

    def replayed(self) -> None:
        """Count an answer that is begun anew by the next engine."""
        self._replays.inc()

    def engine_gone(self) -> None:
        """Record that the engine has ended and holds no memory any more."""
        self._up.set(0)
        self._memory.clear()
        self.now = None
        for gauge in (self._blocks_free, self._usage, *self._step_gauges.values()):
            gauge.set(0)

    def _note_memory(self, memory: Iterable[RankMemory]) -> None:
        for rank in memory:
            self._memory.labels(str(rank.rank), "resident").set(rank.resident)
            if rank.gpu is not None:
                self._memory.labels(str(rank.rank), "gpu").set(rank.gpu)

    def first_token(self, ttft: float, queued: float) -> None:
        """Count an answer's first token, `ttft` seconds after the request's arrival, `queued` of them in the queue."""
        self._first_token.observe(ttft)
        self._queue.observe(queued)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """Count `tokens` that came `seconds` after the previous ones."""
        each = seconds / tokens
        for _ in range(tokens):
            self._inter_token.observe(each)

    def ended(
        self,
        outcome: Outcome,
        duration: float,
        decode_rate: float | None,
        *,
        drafter: str = NO_DRAFTER,
        prompt_tokens: int = 0,
        tokens: int = 0,
    ) -> None:
        """Count an answer that has ended, `duration` seconds after its request's arrival."""
        self._outcomes[outcome].inc()
        if outcome in ("stop", "length"):
            self._end_to_end.observe(duration)
            self._prompt_length.observe(prompt_tokens)
            self._answer_length.observe(tokens)
            if decode_rate is not None:
                self._decode_rate.labels(self._model, drafter).observe(decode_rate)

    def refused(self) -> None:
        """Count a request that was answered with an error instead of being given to the engine."""
        self._outcomes["refused"].inc()

    def tenant_used(self, name: str | None, prompt: int, generated: int) -> None:
        """Count a request that was served with an API key of this name."""
        if name is None:
            return
        label = self._tenant(name)
        self._tenant_requests.labels(label, "served").inc()
        self._tenant_tokens.labels(label, "prompt").inc(prompt)
        self._tenant_tokens.labels(label, "generated").inc(generated)

    def tenant_limited(self, name: str | None) -> None:
        """Count a request that was refused by the limits of its API key's tenant."""
        if name is not None:
            self._tenant_requests.labels(self._tenant(name), "limited").inc()

    def _tenant(self, name: str) -> str:
        """Return the label of a tenant: names are the operator's, but a file of keys may have thousands."""
        if len(self._tenants) < MAX_TENANTS:
            self._tenants.add(name)
        return name if name in self._tenants else OTHER_TENANTS

    def responded(self, route: str, status: int) -> None:
        """Count an HTTP response. `route` is a route of the application, or "other"."""
        self._http.labels(route, str(status)).inc()

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Report as the number of open connections what `count` returns."""
        self._connections.set_function(count)

    def connection_ended(self, reason: str) -> None:
        """Count a connection that was refused or closed; `reason`: limit, head, body or answer."""
        self._ended_connections.labels(reason).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        own = generate_latest(self.registry)
        return own if self._vllm is None or not self._model else own + generate_latest(self._vllm)


class _Speculation:
    """Metrics of drafters, verification and the controller."""

    def __init__(self, counter: Callable[..., Counter], histogram: Callable[..., Histogram]) -> None:
        drafter, position = ("drafter",), ("drafter", "position")
        self._drafted = counter("drafted_tokens", "Drafted tokens that the target verified.", drafter)
        self._accepted = counter("accepted_tokens", "Drafted tokens that the target agreed with.", drafter)
        self._wasted = counter("wasted_tokens", "Drafted tokens that the target did not agree with.", drafter)
        self._drafted_at = counter(
            "position_drafted_tokens", "Drafted tokens by their position in the draft.", position
        )
        self._accepted_at = counter(
            "position_accepted_tokens", "Drafted tokens that the target agreed with, by position.", position
        )
        self._step_tokens = histogram(
            "sequence_step_tokens",
            "Tokens that a step added to a decoding sequence: the accepted ones and one more. Its mean is the mean "
            "accepted length.",
            drafter,
            buckets=_STEP_TOKENS,
        )
        self._chosen = counter(
            "drafter_chosen", "The controller's choices, one for each decoding sequence and step.", drafter
        )
        self._tokens = counter("decode_tokens", "Tokens added by steps that only decoded.")
        self._seconds = counter("decode_seconds", "Time of the steps that only decoded.")
        self._predicted = counter(
            "decode_predicted_seconds", "Time that the controller predicted for those tokens when it chose to draft."
        )
        self._plain = counter(
            "decode_plain_estimated_seconds",
            "An estimate: the time of those tokens without drafts, by the controller's prediction; for steps without "
            "drafts, the time that they took.",
        )

    def begin(self, drafters: Iterable[str]) -> None:
        """Create every series of each drafter at 0, so that rates do not miss the first increment."""
        for drafter in drafters:
            for counter in (self._drafted, self._accepted, self._wasted):
                counter.labels(drafter)
            for counter in (self._drafted_at, self._accepted_at):
                for position in range(1, POSITIONS + 2):
                    counter.labels(drafter, _position(position))
        for drafter in (NO_DRAFTER, *drafters):
            self._step_tokens.labels(drafter)
            self._chosen.labels(drafter)

    def step(self, stats: StepStats) -> None:
        for drafter, drafted in stats.drafted.items():
            accepted = stats.accepted.get(drafter, 0)
            self._drafted.labels(drafter).inc(drafted)
            self._accepted.labels(drafter).inc(accepted)
            self._wasted.labels(drafter).inc(drafted - accepted)
        for counter, tally in ((self._drafted_at, stats.drafted_at), (self._accepted_at, stats.accepted_at)):
            for drafter, counts in tally.items():
                for position, count in enumerate(counts, start=1):
                    counter.labels(drafter, _position(position)).inc(count)
        for drafter, lengths in stats.step_tokens.items():
            histogram = self._step_tokens.labels(drafter)
            for length in lengths:
                histogram.observe(length)
        for drafter, count in stats.chosen.items():
            self._chosen.labels(drafter).inc(count)
        self._weigh(stats)

    def _weigh(self, stats: StepStats) -> None:
        """Compare measured and predicted time of steps that only decoded."""
        decoding = sum(map(len, stats.step_tokens.values()))
        if not 0 < decoding == stats.sequences:
            return
        if stats.predicted_goodput <= 0 or stats.predicted_plain_goodput <= 0:
            return
        tokens = sum(map(sum, stats.step_tokens.values()))
        seconds = sum(stats.seconds.values())
        self._tokens.inc(tokens)
        self._seconds.inc(seconds)
        self._predicted.inc(tokens / stats.predicted_goodput)
        if stats.drafted:
            self._plain.inc(tokens / stats.predicted_plain_goodput)
        else:  # without drafts, the step would only have saved the time of drafting
            self._plain.inc(seconds - stats.seconds.get("draft", 0.0))


def _position(position: int) -> str:
    return str(position) if position <= POSITIONS else f"{POSITIONS + 1}+"
