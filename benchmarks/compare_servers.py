"""Compare OpenAI-compatible servers under load, in turns, so that ratios hold on a machine whose speed drifts.

    python benchmarks/compare_servers.py \\
        --server vanilla=http://127.0.0.1:8000 --extra 'vanilla={"speculation": "off"}' \\
        --server ngram=http://127.0.0.1:8000 --server other=http://127.0.0.1:9000@its-model-name \\
        --concurrency 1,8 --max-tokens 128 --rounds 3 --json out.json

Each round visits every server at every concurrency (A B A B ...), in a closed loop: a new request starts when one ends.
Figures are medians over the rounds; a ratio is taken within its round, to the first server. The columns:

- tokens/s: output tokens of a visit (the server's own `usage`) by its duration, first request to last token;
- TTFT p50: from sending a request to its first text, the median of the requests;
- ITL p50: (last text - first text) / (tokens - 1) of a request, the median of the requests;
- pause p99: 99th percentile of the pauses between two chunks of a stream, which can bring several tokens each.

Each request has a numbered system message, so that no visit profits from the prefix cache of an earlier one (--plain
leaves it out). A memory of past answers finds them all the same: start Pilotfish with --suffix-memory 0. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

PROMPTS = Path(__file__).parents[1] / "server" / "cli" / "prompts.jsonl"


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    model: str
    extra: dict[str, Any]
    """Merged into every request's body."""


@dataclass(frozen=True)
class Visit:
    """The figures of one server under one load in one round. Times in seconds."""

    server: str
    concurrency: int
    round: int
    requests: int
    tokens: int
    tokens_per_second: float
    ttft_p50: float
    itl_p50: float
    pause_p99: float


@dataclass(frozen=True)
class Answer:
    tokens: int
    ttft: float
    itl: float
    pauses: list[float]


async def ask(client: httpx.AsyncClient, server: Server, messages: list[dict[str, str]], args: Any) -> Answer:
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "ignore_eos": args.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        **server.extra,
    }
    times, tokens = [time.perf_counter()], 0
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.name}: HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(f"{server.name}: {chunk['error']}")
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter())
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    if len(times) < 2 or not tokens:
        raise SystemExit(f"{server.name}: an answer without text or usage")
    pauses = [later - sooner for sooner, later in itertools.pairwise(times[1:])]
    return Answer(tokens, times[1] - times[0], (times[-1] - times[1]) / max(1, tokens - 1), pauses)


async def visit(server: Server, chats: list[list[dict[str, str]]], concurrency: int, round_: int, args: Any) -> Visit:
    gate = asyncio.Semaphore(concurrency)

    async def in_turn(messages: list[dict[str, str]]) -> Answer:
        async with gate:
            return await ask(client, server, messages, args)

    async with httpx.AsyncClient(
        timeout=1200, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
    ) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*map(in_turn, chats))
        seconds = time.perf_counter() - start
    tokens = sum(answer.tokens for answer in answers)
    pauses = sorted(pause for answer in answers for pause in answer.pauses) or [0.0]
    return Visit(
        server=server.name,
        concurrency=concurrency,
        round=round_,
        requests=len(answers),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        ttft_p50=statistics.median(answer.ttft for answer in answers),
        itl_p50=statistics.median(answer.itl for answer in answers),
        pause_p99=pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))],
    )


def table(visits: list[Visit], servers: list[Server], loads: list[int]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| server | streams | tokens/s | ratio | TTFT p50, ms | ITL p50, ms | pause p99, ms |"
    yield "|---|---|---|---|---|---|---|"
    for load in loads:
        first = {v.round: v for v in visits if v.server == servers[0].name and v.concurrency == load}
        for server in servers:
            mine = [v for v in visits if v.server == server.name and v.concurrency == load]

            def median(of: Callable[[Visit], float], mine: list[Visit] = mine) -> float:
                return statistics.median(map(of, mine))

            base = {number: v.tokens_per_second for number, v in first.items()}
            ratio = median(lambda v, base=base: v.tokens_per_second / base[v.round])  # type: ignore[misc]
            yield (
                f"| {server.name} | {load} | {median(lambda v: v.tokens_per_second):.1f} | {ratio:.2f} "
                f"| {1e3 * median(lambda v: v.ttft_p50):.0f} | {1e3 * median(lambda v: v.itl_p50):.1f} "
                f"| {1e3 * median(lambda v: v.pause_p99):.0f} |"
            )


def read_prompts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row["prompt"] if "prompt" in row else row["turns"][0] for row in rows]


def read_servers(args: Any) -> list[Server]:
    extras = {name: json.loads(body) for name, _, body in (extra.partition("=") for extra in args.extra)}
    servers = []
    for name, _, address in (server.partition("=") for server in args.server):
        url, _, model = address.partition("@")
        url = url.rstrip("/")
        model = model or httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        servers.append(Server(name, url, model, extras.pop(name, {})))
    if extras:
        raise SystemExit(f"--extra names {', '.join(extras)}, which no --server has as its name")
    return servers


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL[@MODEL]")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="NAME=JSON", help="more for a server's requests"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help='JSON lines with "prompt", or "turns" (a list)')
    parser.add_argument("--concurrency", default="1,8", help="requests in flight, one load after the other")
    parser.add_argument("--requests", type=int, default=8, help="of a visit; at least the concurrency")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--no-ignore-eos", dest="ignore_eos", action="store_false", help="let answers end by themselves"
    )
    parser.add_argument("--plain", action="store_true", help="no system message: prefix caches must be off then")
    parser.add_argument("--json", type=Path, help="where to write the figures of every visit")
    args = parser.parse_args()
    prompts, servers = read_prompts(args.prompts), read_servers(args)
    loads = [int(load) for load in args.concurrency.split(",")]
    numbers = itertools.count(time.time_ns() // 1_000_000_000)

    def chat(prompt: str) -> list[dict[str, str]]:
        user = {"role": "user", "content": prompt}
        if args.plain:
            return [user]
        return [{"role": "system", "content": f"{next(numbers)}: You are a helpful assistant."}, user]

    for server in servers:  # warm up
        await visit(server, [chat(prompts[0])], 1, 0, args)
    visits: list[Visit] = []
    ahead = itertools.cycle(prompts)
    for round_ in range(args.rounds):
        for load in loads:
            asked = list(itertools.islice(ahead, max(args.requests, load)))
            for server in servers:
                visits.append(await visit(server, [chat(prompt) for prompt in asked], load, round_, args))
                print(json.dumps(asdict(visits[-1])), flush=True)
    print("", *table(visits, servers, loads), sep="\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in visits], indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
