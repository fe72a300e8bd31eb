"""Prometheus metrics, `pilotfish_*`, in base units: docs/metrics.md says what each means. Labels have few values, none
of which is a client's string: routes, statuses, outcomes, drafters, positions, phases.

Counters and gauges come from the engine's steps. The histograms of latencies are taken here, where a client's
chunks are written: from the request's arrival at this server, and with the way between the processes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Literal, get_args

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

Outcome = Literal["stop", "length", "abort", "error", "refused"]

PHASES = ("plan", "draft", "forward", "sample", "commit")
NO_DRAFTER = "none"
POSITIONS = 16
"""Positions of a draft that have a label of their own."""

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


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = self.registry = registry if registry is not None else CollectorRegistry()
        disable_created_metrics()  # a series for each counter that says when it began: Prometheus makes nothing of it
        ProcessCollector(registry=registry)
        self.last_step = 0.0
        """time.monotonic() when the engine last told of a step."""
        self._model = ""
        make = _Maker(registry)
        self._make_server(make)
        self._make_requests(make)
        self._make_engine(make)
        self._speculation = _Speculation(make)

    def _make_server(self, make: _Maker) -> None:
        make.info("build", "Versions of Pilotfish, Python and torch.").info(
            {"version": __version__, "python": platform.python_version(), "torch": version("torch")}
        )
        self._info = make.info("engine", "The model that is served and how it runs.")
        self._up = make.gauge("engine_up", "1 while the engine takes requests.")
        self._load = make.gauge("engine_load_seconds", "What loading the model took.")
        self._memory = make.gauge(
            "rank_memory_bytes", "Memory of an engine process: resident, and allocated on its GPU.", "rank", "kind"
        )

    def _make_requests(self, make: _Maker) -> None:
        self._http = make.counter(
            "http_requests", "HTTP responses by route and status; 'other' is every path that is no route.",
            "route", "status",
        )  # fmt: skip
        requests = make.counter(
            "requests",
            "Answers by how they ended; a stop string is a stop, a client that left an abort. A refused request is "
            "one that was answered with an error before it was given to the engine.",
            "outcome",
        )
        self._outcomes = {outcome: requests.labels(outcome) for outcome in get_args(Outcome)}
        self._first_token = make.histogram(
            "time_to_first_token_seconds", "From a request's arrival to an answer's first token (TTFT).", _SECONDS
        )
        self._inter_token = make.histogram(
            "inter_token_latency_seconds",
            "Between the tokens of an answer (ITL). Tokens that a step brings together share the time since the step "
            "before, each with an equal part; every token after the first counts once.",
            _ITL_SECONDS,
        )
        self._end_to_end = make.histogram(
            "request_duration_seconds", "From a request's arrival to an answer's end.", _SECONDS
        )
        self._queue = make.histogram("request_queue_seconds", "From a request's arrival to its first step.", _SECONDS)
        self._decode_rate = make.histogram(
            "request_decode_tokens_per_second",
            "Tokens of an answer after its first, by the time from it. By the drafter that drafted most for it.",
            _PER_SECOND, "model", "drafter",
        )  # fmt: skip
        self._prompt_length = make.histogram("request_prompt_tokens", "Tokens of an answer's prompt.", _TOKENS)
        self._answer_length = make.histogram("request_generated_tokens", "Tokens of an answer.", _TOKENS)

    def _make_engine(self, make: _Maker) -> None:
        self._prompt_tokens = make.counter("prompt_tokens", "Prompt tokens computed (not those from the prefix cache).")
        self._generated_tokens = make.counter("generated_tokens", "Tokens generated.")
        self._steps = make.counter("engine_steps", "Steps of the engine.")
        phases = make.histogram("step_phase_seconds", "Time of a step, by its phases.", _STEP_SECONDS, "phase")
        self._phases = {phase: phases.labels(phase) for phase in PHASES}
        self._sequences = make.histogram(
            "step_sequences", "Batch size: sequences that a step computed something of.", _SEQUENCES
        )
        self._rows = make.histogram("step_rows", "Token rows that the target computed in a step.", _ROWS)
        self._running = make.gauge("sequences_running", "Sequences that the engine decodes or prefills.")
        self._waiting = make.gauge("sequences_waiting", "Sequences that wait for the engine.")
        self._most_sequences = make.gauge("sequences_max", "Most sequences that run at once.")
        self._preemptions = make.counter("preemptions", "Sequences that lost their memory to an older one for a while.")
        self._blocks_used = make.gauge("kv_blocks_used", "KV-cache blocks that sequences hold.")
        self._blocks_cached = make.gauge("kv_blocks_cached", "KV-cache blocks that only the prefix cache keeps.")
        self._blocks_free = make.gauge("kv_blocks_free", "KV-cache blocks with nothing in them.")
        self._blocks_total = make.gauge("kv_blocks_total", "KV-cache blocks that there are.")
        self._queried = make.counter("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.")
        self._hits = make.counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.")

    def ready(self, info: EngineInfo) -> None:
        """Note what the engine says of itself, and that it takes requests."""
        named = {"model": info.model, "dtype": info.dtype, "device": info.device, "kernels": info.kernels}
        numbers = {"max_model_len": info.max_model_len, "tensor_parallel_size": info.tensor_parallel_size}
        self._info.info(named | {"drafter": info.default_drafter} | {name: str(n) for name, n in numbers.items()})
        self._model = info.model
        self._up.set(1)
        self._load.set(info.load_seconds)
        self._most_sequences.set(info.max_num_seqs)
        self._blocks_total.set(info.num_blocks)
        self._blocks_free.set(info.num_blocks)
        self._note_memory(info.memory)
        self._speculation.begin(info.drafters)
        for drafter in (NO_DRAFTER, *info.drafters):
            self._decode_rate.labels(info.model, drafter)

    def step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self.last_step = time.monotonic()
        self._steps.inc()
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        if stats.sequences:
            self._sequences.observe(stats.sequences)
            self._rows.observe(stats.rows)
        self._preemptions.inc(stats.preemptions)
        self._queried.inc(stats.prefix_queried_tokens)
        self._hits.inc(stats.prefix_hit_tokens)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_cached.set(stats.blocks_cached)
        self._blocks_free.set(stats.blocks_total - stats.blocks_used - stats.blocks_cached)
        self._blocks_total.set(stats.blocks_total)
        for phase, seconds in stats.seconds.items():
            if (histogram := self._phases.get(phase)) is not None:
                histogram.observe(seconds)
        self._note_memory(stats.memory)
        self._speculation.step(stats)

    def engine_stopping(self) -> None:
        """The engine takes no more requests."""
        self._up.set(0)

    def engine_gone(self) -> None:
        """An engine that has ended holds nothing."""
        self._up.set(0)
        self._memory.clear()
        for gauge in (self._running, self._waiting, *self._blocks):
            gauge.set(0)

    @property
    def _blocks(self) -> tuple[Gauge, ...]:
        return (self._blocks_used, self._blocks_cached, self._blocks_free, self._blocks_total)

    def _note_memory(self, memory: Iterable[RankMemory]) -> None:
        for rank in memory:
            self._memory.labels(str(rank.rank), "resident").set(rank.resident)
            if rank.gpu is not None:
                self._memory.labels(str(rank.rank), "gpu").set(rank.gpu)

    def first_token(self, ttft: float, queued: float) -> None:
        """An answer has its first token: seconds since the request's arrival, and those of them in the queue."""
        self._first_token.observe(ttft)
        self._queue.observe(queued)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """`tokens` came `seconds` after those before them."""
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
        """An answer has ended, `duration` seconds after its request's arrival."""
        self._outcomes[outcome].inc()
        if outcome in ("stop", "length"):
            self._end_to_end.observe(duration)
            self._prompt_length.observe(prompt_tokens)
            self._answer_length.observe(tokens)
            if decode_rate is not None:
                self._decode_rate.labels(self._model, drafter).observe(decode_rate)

    def refused(self) -> None:
        """A request was answered with an error instead of being given to the engine."""
        self._outcomes["refused"].inc()

    def responded(self, route: str, status: int) -> None:
        """An HTTP response was sent. `route` is one of the application's own, or "other"."""
        self._http.labels(route, str(status)).inc()

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Maker:
    """Makes metrics in a registry, with the prefix that all share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"pilotfish_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"pilotfish_{name}", text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"pilotfish_{name}", text, labels, registry=self._registry, buckets=buckets)

    def info(self, name: str, text: str) -> Info:
        return Info(f"pilotfish_{name}", text, registry=self._registry)


class _Speculation:
    """What drafters, verification and the controller do."""

    def __init__(self, make: _Maker) -> None:
        self._drafted = make.counter("drafted_tokens", "Drafted tokens that the target verified.", "drafter")
        self._accepted = make.counter("accepted_tokens", "Drafted tokens that the target agreed with.", "drafter")
        self._wasted = make.counter("wasted_tokens", "Drafted tokens that the target did not agree with.", "drafter")
        position = ("drafter", "position")
        self._drafted_at = make.counter(
            "position_drafted_tokens", "Drafted tokens by their position in the draft.", *position
        )
        self._accepted_at = make.counter(
            "position_accepted_tokens", "Those of them that the target agreed with.", *position
        )
        self._step_tokens = make.histogram(
            "sequence_step_tokens",
            "Tokens that a step added to a decoding sequence: the accepted ones and one more. Its mean is the mean "
            "accepted length.",
            _STEP_TOKENS,
            "drafter",
        )
        self._chosen = make.counter(
            "drafter_chosen", "What the controller chose, once for each decoding sequence and step.", "drafter"
        )
        self._tokens = make.counter("decode_tokens", "Tokens that steps of decoding alone added.")
        self._seconds = make.counter("decode_seconds", "What those steps took.")
        self._predicted = make.counter(
            "decode_predicted_seconds",
            "What the controller predicted that those tokens would take, as it chose to draft.",
        )
        self._plain = make.counter(
            "decode_plain_estimated_seconds",
            "An estimate: what those tokens would have taken without drafts, by the controller's prediction; of steps "
            "without drafts, what they took.",
        )

    def begin(self, drafters: Iterable[str]) -> None:
        """Every series of a drafter's is there from the start, so that a rate misses none of its growth."""
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
        """What decoding took against what it was predicted to take, for steps in which nothing else was done."""
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
        else:  # it was a plain step, and only the search for drafts was for nothing: that is measured, not predicted
            self._plain.inc(seconds - stats.seconds.get("draft", 0.0))


def _position(position: int) -> str:
    return str(position) if position <= POSITIONS else f"{POSITIONS + 1}+"
