"""What replicas behind smg give: throughput of two against one, each on a core of its own; and how many prompt tokens
of conversations cache-aware routing saves against round robin, with three.

    pip install smg==1.13.0
    python benchmarks/replicas.py [--model smollm2-135m] [--json FILE]

Starts the servers and smg on this machine, which needs two cores. Throughput is measured in turns, one replica without
smg and two behind it, so that other work on the machine meets both. Beside the rate by the clock there is the one by
the CPU time that the busiest replica used, and half of smg's, which runs on the same two cores: what the clock would
have shown without other work. Prompt tokens are counted, not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.gateway import Gateway  # noqa: E402
from tests.support.running_server import RunningServer  # noqa: E402

POLICIES = ("round_robin", "cache_aware")
WORDS = ("river", "stone", "window", "harbour", "candle", "orchard", "thunder", "paper", "violet", "engine", "marble")
ANSWER_TOKENS = 32
"""Of a turn of a conversation."""


@dataclass(slots=True)
class Turn:
    """What a turn of a conversation cost. `ttft` is in seconds."""

    prompt_tokens: int
    cached_tokens: int
    ttft: float
    text: str


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


@contextlib.contextmanager
def replicas(count: int, options: argparse.Namespace, folder: Path) -> Iterator[list[RunningServer]]:
    """Servers of a thread each, on one core after the other."""
    flags = ("--model", options.model, "--served-model-name", "m", "--num-threads", "1", "--kv-cache-memory", "768MiB")
    servers = [RunningServer(folder / f"replica{i}", *flags) for i in range(count)]
    try:
        cores = sorted(os.sched_getaffinity(0))
        for i, server in enumerate(servers):
            server.wait_for("/ready", 200)
            pin(server.process.pid, cores[i % len(cores)])
        yield servers
    finally:
        for server in servers:
            server.stop()


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process, and of its children, on a core."""
    top = psutil.Process(pid)
    for process in (top, *top.children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its children have used."""
    top = psutil.Process(pid)
    times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


async def throughput(url: str, requests: int, concurrent: int, tokens: int, salt: str) -> float:
    """Return the tokens a second of so many requests, of which `concurrent` are in flight at a time."""
    numbers = iter(range(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for number in numbers:
            prompt = f"{salt} {number}: {words(random.Random(f'{salt}{number}'), 8)}"
            body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == tokens

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        began = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(concurrent)))
        return requests * tokens / (time.monotonic() - began)


def compare_throughput(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"one": [], "two": []}
    by_cpu: dict[str, list[float]] = {"one": [], "two": []}
    with replicas(2, options, folder) as servers:
        gateway = Gateway(folder / "smg", [server.url for server in servers])
        try:
            for turn in range(-1, options.rounds):
                for name, url, router in (("one", servers[0].url, 0.0), ("two", gateway.url, 0.5)):
                    count = options.requests if turn >= 0 else options.concurrent
                    pids = [server.process.pid for server in servers]
                    before = [cpu_seconds(pid) for pid in (*pids, gateway.process.pid)]
                    rate = asyncio.run(throughput(url, count, options.concurrent, options.tokens, f"{name} {turn}"))
                    after = [cpu_seconds(pid) for pid in (*pids, gateway.process.pid)]
                    *used, routing = (late - early for early, late in zip(before, after, strict=True))
                    if turn >= 0:  # the first warms up
                        rates[name].append(rate)
                        by_cpu[name].append(count * options.tokens / (max(used) + router * routing))
                        print(
                            f"round {turn}, {name}: {rate:.0f} tokens/s, by CPU time {by_cpu[name][-1]:.0f}", flush=True
                        )
        finally:
            gateway.stop()
    found: dict[str, Any] = {}
    for name, each in (("clock", rates), ("cpu_time", by_cpu)):
        ratios = [two / one for one, two in zip(each["one"], each["two"], strict=True)]
        found[name] = {"tokens_per_second": each, "ratios": ratios, "ratio": statistics.median(ratios)}
        print(
            f"two behind smg by one, by the {name}: {statistics.median(ratios):.2f} (median), {min(ratios):.2f} (least)"
        )
    return found


async def converse(url: str, policy: str, options: argparse.Namespace) -> list[Turn]:
    """Hold conversations, whose turns come in another order each time; return all turns."""
    rng, turns = random.Random(7), list[Turn]()
    histories = [f"{words(random.Random(i), 3)}. " for i in range(options.conversations)]

    async def take(http: httpx.AsyncClient, i: int, said: str) -> None:
        histories[i] += said
        turn = await ask(http, histories[i], policy)
        histories[i] += turn.text
        turns.append(turn)

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for _ in range(options.turns):
            order = rng.sample(range(len(histories)), len(histories))
            said = {i: f"\nQ: {words(rng, 40)}?\nA:" for i in order}
            for begin in range(0, len(order), options.at_once):
                await asyncio.gather(*(take(http, i, said[i]) for i in order[begin : begin + options.at_once]))
    return turns


async def ask(http: httpx.AsyncClient, prompt: str, salt: str) -> Turn:
    """Have a history continued; with `salt`, nothing is found of other runs."""
    body = {
        "model": "m", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0,
        "cache_salt": salt, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, parts, usage = time.monotonic(), 0.0, list[str](), dict[str, Any]()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.monotonic() - began
            chunk = json.loads(line.removeprefix("data: "))
            parts += [choice["text"] for choice in chunk["choices"]]
            usage = chunk.get("usage") or usage
    return Turn(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], first, "".join(parts))


def compare_policies(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    texts = set[tuple[str, ...]]()
    with replicas(3, options, folder) as servers:
        for policy in POLICIES:
            gateway = Gateway(folder / policy, [server.url for server in servers], policy=policy)
            try:
                turns = asyncio.run(converse(gateway.url, policy, options))
            finally:
                gateway.stop()
            texts.add(tuple(sorted(turn.text for turn in turns)))
            asked, cached = sum(turn.prompt_tokens for turn in turns), sum(turn.cached_tokens for turn in turns)
            ttft = 1000 * statistics.median(turn.ttft for turn in turns)
            found[policy] = {
                "prompt_tokens": asked, "uncached_tokens": asked - cached, "hit_share": cached / asked,
                "ttft_ms_median": ttft,
            }  # fmt: skip
            print(
                f"{policy}: {asked - cached} of {asked} prompt tokens computed, median TTFT {ttft:.0f} ms", flush=True
            )
    assert len(texts) == 1, "where a request goes has changed a text"
    ratio = found["cache_aware"]["uncached_tokens"] / found["round_robin"]["uncached_tokens"]
    print(f"cache-aware by round robin: {ratio:.2f} of the uncached prompt tokens")
    return found | {"ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", choices=("throughput", "policies"))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of throughput, each of one and of two")
    parser.add_argument("--requests", type=int, default=64, help="requests of a measurement")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, for throughput")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=2, help="conversations that wait for an answer at a time")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(options).items() if name != "json"}
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "throughput":
            results["policies"] = compare_policies(options, Path(folder))
        if options.only != "policies":
            results["throughput"] = compare_throughput(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
