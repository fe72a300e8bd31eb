"""The dashboard *Service*: what clients get, and what the servers have to give it with."""

from __future__ import annotations

from panels import Board, Panel, Query, Row
from replicas import REPLICAS

NO_REQUESTS = "No requests in this time range"
NO_ANSWERS = "No answers in this time range"
NO_SERVER = "No server in this time range"

GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "#808080"


def quantile(share: float, metric: str, over: str = "$__rate_interval") -> str:
    """A quantile of a histogram over all selected servers."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{$i}}[{over}])))"


def quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99))


def mean(metric: str, by: str = "") -> str:
    """The mean of a histogram, empty for times without observations."""
    grouped = f"sum by ({by}) " if by else "sum"
    sums, counts = (f"{grouped}(rate({metric}_{part}{{$i}}[$__rate_interval]))" for part in ("sum", "count"))
    return f"{sums} / ({counts} > 0)"


NOW = Row(
    "Now",
    (
        Panel(
            title="Engines up",
            description="Servers whose engine takes requests. One that loads, stops or is dead does not.",
            unit="short",
            queries=(Query("sum(pilotfish_engine_up{$i})", "up"),),
            empty=NO_SERVER,
            kind="number",
            width=3,
            height=4,
            decimals=0,
            steps=((None, RED), (1, GREEN)),
        ),
        Panel(
            title="Running",
            description="Sequences that the engines decode or prefill at this moment.",
            unit="short",
            queries=(Query("sum(pilotfish_sequences_running{$i})", "running"),),
            empty=NO_SERVER,
            kind="number",
            width=3,
            height=4,
            decimals=0,
        ),
        Panel(
            title="Waiting",
            description="Sequences that wait for an engine at this moment.",
            unit="short",
            queries=(Query("sum(pilotfish_sequences_waiting{$i})", "waiting"),),
            empty=NO_SERVER,
            kind="number",
            width=3,
            height=4,
            decimals=0,
            steps=((None, GREEN), (1, YELLOW), (16, RED)),
        ),
        Panel(
            title="Tokens per second",
            description="Tokens generated per second, all requests and servers together.",
            unit="tokens/s",
            queries=(Query("sum(rate(pilotfish_generated_tokens_total{$i}[$__rate_interval]))", "generated"),),
            empty=NO_SERVER,
            kind="number",
            width=3,
            height=4,
        ),
        Panel(
            title="First token, p95",
            description="95 of 100 answers began within this time after the request's arrival (TTFT). The alert's "
            "objective is 2 s.",
            unit="s",
            queries=(Query(quantile(0.95, "pilotfish_time_to_first_token_seconds"), "p95"),),
            empty="No requests",
            kind="number",
            width=3,
            height=4,
            steps=((None, GREEN), (1, YELLOW), (2, RED)),
        ),
        Panel(
            title="Errors",
            description="Share of the answers that ended with an error, over the selected time.",
            unit="percentunit",
            queries=(
                Query(
                    'sum(increase(pilotfish_requests_total{outcome="error", $i}[$__range])) '
                    '/ (sum(increase(pilotfish_requests_total{outcome!="refused", $i}[$__range])) > 0)',
                    "errors",
                ),
            ),
            empty="No requests",
            kind="number",
            width=3,
            height=4,
            decimals=1,
            steps=((None, GREEN), (0.005, YELLOW), (0.02, RED)),
        ),
        Panel(
            title="KV cache in use",
            description="Share of the KV cache's blocks that sequences hold. What only the prefix cache keeps can "
            "be had at once and does not count.",
            unit="percentunit",
            queries=(Query("sum(pilotfish_kv_blocks_used{$i}) / (sum(pilotfish_kv_blocks_total{$i}) > 0)", "used"),),
            empty=NO_SERVER,
            kind="number",
            width=3,
            height=4,
            decimals=1,
            steps=((None, GREEN), (0.8, YELLOW), (0.95, RED)),
        ),
        Panel(
            title="Prefix cache",
            description="Share of the prompt tokens that the prefix cache had, over the selected time.",
            unit="percentunit",
            queries=(
                Query(
                    "sum(increase(pilotfish_prefix_cache_hit_tokens_total{$i}[$__range])) "
                    "/ (sum(increase(pilotfish_prefix_cache_queried_tokens_total{$i}[$__range])) > 0)",
                    "hits",
                ),
            ),
            empty="No prompts",
            kind="number",
            width=3,
            height=4,
            decimals=1,
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            title="Answers by outcome",
            description="Answers that ended, per second. stop: at an end of text or a stop string; length: at "
            "max_tokens; abort: the client left, or the server stopped; error: the server failed; "
            "refused: answered with an error before the engine had it.",
            unit="ops",
            queries=(Query("sum by (outcome) (rate(pilotfish_requests_total{$i}[$__rate_interval]))", "{{outcome}}"),),
            empty=NO_REQUESTS,
            kind="stacked",
            colours={"stop": GREEN, "length": BLUE, "abort": YELLOW, "refused": ORANGE, "error": RED},
        ),
        Panel(
            title="HTTP responses by status",
            description="HTTP responses per second, by status. An error in the middle of a stream has status 200 "
            "and shows under Answers by outcome.",
            unit="reqps",
            queries=(
                Query("sum by (status) (rate(pilotfish_http_requests_total{$i}[$__rate_interval]))", "{{status}}"),
            ),
            empty=NO_REQUESTS,
            kind="stacked",
        ),
        Panel(
            title="Share of answers with errors",
            description="Answers that ended with an error, as a share of those that the engine was asked for. The "
            "line is the alert's limit.",
            unit="percentunit",
            queries=(
                Query(
                    'sum(rate(pilotfish_requests_total{outcome="error", $i}[$__rate_interval])) '
                    '/ (sum(rate(pilotfish_requests_total{outcome!="refused", $i}[$__rate_interval])) > 0)',
                    "errors",
                ),
            ),
            empty=NO_REQUESTS,
            colours={"errors": RED},
            steps=((None, "transparent"), (0.02, RED)),
        ),
        Panel(
            title="Tokens per second, in all",
            description="Tokens of all servers per second. generated: written; prompt: read and computed; from the "
            "prefix cache: read without being computed.",
            unit="tokens/s",
            queries=(
                Query("sum(rate(pilotfish_generated_tokens_total{$i}[$__rate_interval]))", "generated"),
                Query("sum(rate(pilotfish_prompt_tokens_total{$i}[$__rate_interval]))", "prompt"),
                Query(
                    "sum(rate(pilotfish_prefix_cache_hit_tokens_total{$i}[$__rate_interval]))", "from the prefix cache"
                ),
            ),
            empty=NO_SERVER,
        ),
        Panel(
            title="Tokens per second of an answer",
            description="How fast single answers are written, from their first token on. p50: half of the answers "
            "are slower; p5: 5 of 100 are.",
            unit="tokens/s",
            queries=tuple(
                Query(quantile(share, "pilotfish_request_decode_tokens_per_second"), f"p{share * 100:g}")
                for share in (0.5, 0.05)
            ),
            empty=NO_ANSWERS,
        ),
        Panel(
            title="Length of prompts and answers",
            description="Mean number of tokens of a prompt and of an answer.",
            unit="short",
            queries=(
                Query(mean("pilotfish_request_prompt_tokens"), "prompt"),
                Query(mean("pilotfish_request_generated_tokens"), "answer"),
            ),
            empty=NO_ANSWERS,
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel(
            title="Time to first token",
            description="From a request's arrival to an answer's first token (TTFT): the time in the queue, and "
            "reading the prompt. The line is the alert's objective for p95.",
            unit="s",
            queries=quantiles("pilotfish_time_to_first_token_seconds"),
            empty=NO_REQUESTS,
            width=6,
            steps=((None, "transparent"), (2, RED)),
        ),
        Panel(
            title="Between tokens",
            description="Between the tokens of an answer (ITL). Tokens that a step brings together share the time "
            "since the step before.",
            unit="s",
            queries=quantiles("pilotfish_inter_token_latency_seconds"),
            empty=NO_REQUESTS,
            width=6,
        ),
        Panel(
            title="Whole answers",
            description="From a request's arrival to an answer's end.",
            unit="s",
            queries=quantiles("pilotfish_request_duration_seconds"),
            empty=NO_ANSWERS,
            width=6,
        ),
        Panel(
            title="In the queue",
            description="From a request's arrival to its first step.",
            unit="s",
            queries=quantiles("pilotfish_request_queue_seconds"),
            empty=NO_REQUESTS,
            width=6,
        ),
    ),
)

ENGINE = Row(
    "Engine",
    (
        Panel(
            title="Sequences",
            description="Sequences that run and that wait, all servers together, and how many may run at once "
            "(--max-num-seqs).",
            unit="short",
            queries=(
                Query("sum(pilotfish_sequences_running{$i})", "running"),
                Query("sum(pilotfish_sequences_waiting{$i})", "waiting"),
                Query("sum(pilotfish_sequences_max{$i})", "most at once"),
            ),
            empty=NO_SERVER,
            colours={"running": GREEN, "waiting": ORANGE, "most at once": GREY},
        ),
        Panel(
            title="KV cache",
            description="Blocks of the KV cache. used: held by sequences; cached: kept by the prefix cache, to be "
            "had at once; free: empty.",
            unit="short",
            queries=tuple(Query(f"sum(pilotfish_kv_blocks_{what}{{$i}})", what) for what in ("used", "cached", "free")),
            empty=NO_SERVER,
            kind="stacked",
            colours={"used": BLUE, "cached": YELLOW, "free": GREY},
        ),
        Panel(
            title="Preemptions",
            description="Running sequences, per second, that had to give their blocks to an older one and wait "
            "again. More than now and then: the KV cache is too small for what runs at once.",
            unit="ops",
            queries=(Query("sum(rate(pilotfish_preemptions_total{$i}[$__rate_interval]))", "preemptions"),),
            empty=NO_SERVER,
            colours={"preemptions": ORANGE},
        ),
        Panel(
            title="A step's time",
            description="Mean time of a step of the engine, by its phases: draft, plan (scheduling), forward (the "
            "model's pass), sample (drawing and verification), commit.",
            unit="s",
            queries=(Query(mean("pilotfish_step_phase_seconds", by="phase"), "{{phase}}"),),
            empty="No steps in this time range",
            kind="stacked",
        ),
        Panel(
            title="A step's work",
            description="Mean number of sequences in a step, and of token rows that the model computed for them: "
            "prompts' chunks, one row for each decoding sequence, and drafted tokens.",
            unit="short",
            queries=(
                Query(mean("pilotfish_step_sequences"), "sequences"),
                Query(mean("pilotfish_step_rows"), "rows"),
            ),
            empty="No steps in this time range",
        ),
        Panel(
            title="Time in steps",
            description="Share of the time that the engines spent in steps, by phase; the rest they had nothing to do.",
            unit="percentunit",
            queries=(
                Query(
                    "sum by (phase) (rate(pilotfish_step_phase_seconds_sum{$i}[$__rate_interval])) "
                    "/ on () group_left () count(pilotfish_engine_up{$i})",
                    "{{phase}}",
                ),
            ),
            empty=NO_SERVER,
            kind="stacked",
        ),
        Panel(
            title="Memory of the engine",
            description="Memory of each engine process. resident: physical memory of the machine; gpu: what torch "
            "has allocated on a GPU.",
            unit="bytes",
            queries=(Query("pilotfish_rank_memory_bytes{$i}", "{{instance}} rank {{rank}} {{kind}}"),),
            empty=NO_SERVER,
            width=12,
        ),
        Panel(
            title="Memory of the server",
            description="Physical memory of the process that speaks HTTP.",
            unit="bytes",
            queries=(Query('process_resident_memory_bytes{job="pilotfish", $i}', "{{instance}}"),),
            empty=NO_SERVER,
            width=12,
        ),
    ),
)

BOARD = Board(
    uid="pilotfish-service",
    title="Pilotfish: Service",
    description="Traffic, errors, latencies, tokens, queue and KV cache of Pilotfish's servers.",
    rows=(NOW, TRAFFIC, LATENCY, ENGINE, REPLICAS),
)
