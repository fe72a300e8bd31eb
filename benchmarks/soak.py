"""Soak: a server under a mixed load for minutes or hours, with faults; what it answered, and what is left at the end.

    python benchmarks/soak.py --seconds 1200 --faults kill-engine,stop-engine,fill-disk,drop-connections
    python benchmarks/soak.py --seconds 1200 --faults all
    python benchmarks/soak.py --seconds 3600 --faults none

Starts a server on this machine. Texts are compared with those that the same server gives beforehand, one at a time. The
exit status is 1 if a request had no end, was answered twice or wrongly, or if memory of the KV cache was not freed.
`--out DIR` keeps a report: README.md, report.json and plots.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from soak_faults import FAULTS
from soak_load import MODEL, Load, Seen
from soak_report import Report, Sample, write

from tests.support.running_server import RunningServer

SUBJECTS = (
    "the sea",
    "a clock",
    "the number seven",
    "bread",
    "a fox",
    "light",
    "the city",
    "rain",
    "a letter",
    "music",
)
OPENINGS = ("Once upon a time, {} was", "A short list about {}: 1.", "Explain {} to a child. It is", "{} and {} and")
WARM_UP = 0.25
"""Share of the time that does not count for the slope of memory."""


def prompts(count: int) -> list[dict[str, Any]]:
    """Requests of different lengths, every other one of them sampled."""
    draw = random.Random(1)
    made = []
    for i in range(count):
        subject = f"{SUBJECTS[i % len(SUBJECTS)]} ({i})"
        text = OPENINGS[i // len(SUBJECTS) % len(OPENINGS)].replace("{}", subject) + " and so on" * draw.randrange(30)
        temperature = 0.0 if i % 2 else 0.8
        made.append({
            "model": MODEL, "prompt": text, "max_tokens": draw.randrange(4, 40), "seed": i, "temperature": temperature,
        })  # fmt: skip
    return made


async def texts_alone(http: httpx.AsyncClient, asked: list[dict[str, Any]]) -> list[str]:
    texts = []
    for body in asked:
        answer = await http.post("/v1/completions", json=body)
        texts.append(answer.json()["choices"][0]["text"])
    return texts


async def recovered(http: httpx.AsyncClient) -> float:
    """Seconds until a request is answered."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(httpx.HTTPError):
            body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "user": "probe"}
            if (await http.post("/v1/completions", json=body, timeout=30)).status_code == 200:
                return time.monotonic() - began
        await asyncio.sleep(0.05)


async def inject(server: RunningServer, load: Load, names: list[str], every: float, report: Report) -> None:
    """Inject the faults in turn, as long as there is time for another."""
    async with httpx.AsyncClient(base_url=server.url) as http:
        for i in range(10**6):
            await asyncio.sleep(every)
            if not names or load.seen.now() > report.seconds - every:
                break
            name, began = names[i % len(names)], load.seen.now()
            if name == "drop-connections":
                await load.drop()
            await FAULTS[name](server)
            report.faults.append((name, began, await recovered(http)))
            print(f"{load.seen.now():7.0f} s: {name}, answers again after {report.faults[-1][2]:.2f} s", flush=True)


def faults_of(options: argparse.Namespace) -> list[str]:
    """The faults that are injected in turn. All: those that the server can have; only a sharded model has ranks."""
    if options.faults == "all":
        return [name for name in FAULTS if name != "kill-rank" or options.tensor_parallel_size > 1]
    return [] if options.faults == "none" else options.faults.split(",")


async def watch(server: RunningServer, seen: Seen, report: Report) -> None:
    """Sample the memory of the processes."""
    while True:
        with contextlib.suppress(psutil.Error, ValueError):
            process, engine = psutil.Process(server.process.pid), server.engine
            memory = (process.memory_info().rss, engine.memory_info().rss)
            report.samples.append(Sample(seen.now(), engine.pid, *memory, process.num_fds()))
        await asyncio.sleep(1)


async def soak(server: RunningServer, options: argparse.Namespace) -> Report:
    asked = prompts(options.prompts)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        texts = await texts_alone(http, asked)
    seen = Seen()
    load, report = Load(server.url, asked, texts, seen), Report(seen, options.seconds, options.clients)
    descriptors = psutil.Process(server.process.pid).num_fds()
    names = faults_of(options)
    watching = asyncio.create_task(watch(server, seen, report))
    clients = [asyncio.create_task(load.client(i, options.seed * 1000 + i)) for i in range(options.clients)]
    await inject(server, load, names, options.fault_every, report)
    await asyncio.sleep(max(0.0, options.seconds - seen.now()))
    load.stopping = True
    await asyncio.wait(clients, timeout=180)
    report.hanging = sum(not client.done() for client in clients)
    await load.drop()
    await asyncio.sleep(3)
    for task in (watching, *clients):
        task.cancel()
    await asyncio.gather(watching, *clients, return_exceptions=True)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        again = await texts_alone(http, asked[:10])
        report.same_after = again == texts[:10]
    report.left = {
        name: server.metric(f"pilotfish_{name}")
        for name in ("kv_blocks_used", "sequences_running", "sequences_waiting")
    }
    report.left["descriptors"] = psutil.Process(server.process.pid).num_fds() - descriptors
    report.restarts = server.metric("pilotfish_engine_restarts_total")
    report.replayed = server.metric("pilotfish_requests_replayed_total")
    report.healthy = server.status("/health") == 200
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--faults", default="none", help=f"some of {','.join(FAULTS)}, all, or none")
    parser.add_argument("--fault-every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the report")
    options = parser.parse_args()
    if unknown := set(options.faults.split(",")) - {"none", "all", *FAULTS}:
        parser.error(f"no fault is called {' or '.join(sorted(unknown))}: there are {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", options.model, "--served-model-name", MODEL, "--engine-restarts", "100000"]
        flags += ["--engine-restart-window", "1", "--response-store", f"{folder}/responses"]
        flags += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
        server = RunningServer(Path(folder) / "log", *flags)
        try:
            server.wait_for("/ready", 200)
            report = asyncio.run(soak(server, options))
        finally:
            server.stop()
    text = report.text(" ".join(["python benchmarks/soak.py", *sys.argv[1:]]), WARM_UP)
    print(text)
    if options.out is not None:
        write(report, text, options.out)
    return 0 if report.right else 1


if __name__ == "__main__":
    sys.exit(main())
