"""What one client's many requests cost another: the time to first token (TTFT) of short requests, alone and beside a
client that keeps as many long ones in flight as it likes.

    python benchmarks/fairness.py [--policy fcfs] [--model smollm2-135m] [--concurrent 60] [--tokens 300]

Starts a server on this machine. The two are two `user`s of it, and the requests are streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.running_server import RunningServer  # noqa: E402

SHORT_TOKENS = 8
PROMPT = "The sea was calm and the light on the water"


async def ttft(client: httpx.AsyncClient, model: str, i: int) -> float:
    """Send a short request; return the seconds to its first token."""
    body = {"model": model, "prompt": f"{i}: {PROMPT}", "max_tokens": SHORT_TOKENS, "user": "short", "stream": True}
    began, first = time.monotonic(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and not first:
                first = time.monotonic() - began
    return first


async def load(client: httpx.AsyncClient, model: str, tokens: int, number: int, done: list[int]) -> None:
    """Send long requests one after the other."""
    for i in range(10**6):
        body = {
            "model": model, "prompt": f"{number}.{i}: {PROMPT}", "max_tokens": tokens, "ignore_eos": True,
            "user": "long",
        }  # fmt: skip
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        done.append(answer.json()["usage"]["completion_tokens"])


async def measure(server: RunningServer, model: str, concurrent: int, tokens: int, count: int) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await ttft(client, model, -1)
        alone = [await ttft(client, model, i) for i in range(count)]
        done: list[int] = []
        tasks = [asyncio.create_task(load(client, model, tokens, i, done)) for i in range(concurrent)]
        await asyncio.sleep(5)
        beside, began, before = [], time.monotonic(), len(done)
        for i in range(count):
            beside.append(await ttft(client, model, count + i))
            await asyncio.sleep(0.5)
        rate = sum(done[before:]) / (time.monotonic() - began)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    for name, seconds in (("alone", alone), (f"beside {concurrent} of {tokens} tokens", beside)):
        values = sorted(1000 * second for second in seconds)
        print(f"TTFT {name}: median {statistics.median(values):.0f} ms, most {values[-1]:.0f} ms")
    print(f"the long ones meanwhile: {rate:.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="fair", choices=("fair", "priority", "fcfs"))
    parser.add_argument("--concurrent", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--count", type=int, default=20, help="short requests each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--model", options.model, "--served-model-name", "m", "--scheduling-policy", options.policy)
        server = RunningServer(Path(folder) / "log", *flags)
        try:
            server.wait_for("/ready", 200)
            print(f"{options.model}, --scheduling-policy {options.policy}")
            asyncio.run(measure(server, "m", options.concurrent, options.tokens, options.count))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
