"""What large bodies of some clients cost all others: /health, and the gaps of a stream, while they are sent.

    python benchmarks/large_bodies.py --model smollm2-135m --clients 8 --megabytes 7

A real server in a process of its own. For each kind of body, clients send it over and over, while another reads a
stream and a third asks /health every 20 ms. The first row is without any large body: what the engine and the machine do
by themselves. Memory is that of the server's process, without its engine's: the most, and 5 s after.

Those who send have a process of their own, whose interpreter the measuring threads do not wait for, and it yields to
the rest: such clients would be on other machines.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import psutil

HEADERS = {"Content-Type": "application/json"}
POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0


@dataclass(frozen=True)
class Body:
    path: str
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """Seconds that each /health and each chunk of the stream took, statuses of large bodies, and bytes of memory."""

    health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    most: int = 0
    after: int = 0

    def row(self, name: str, seconds: float) -> str:
        health, gaps = sorted(self.health), sorted(self.gaps)
        counts = {status: self.statuses.count(status) for status in sorted(set(self.statuses))}
        return (
            f"{name:<16} /health p50 {1e3 * statistics.median(health):6.1f} p99 {1e3 * _p99(health):6.1f} max "
            f"{1e3 * health[-1]:6.1f} ms, gaps p50 {1e3 * statistics.median(gaps):6.1f} p99 {1e3 * _p99(gaps):6.1f} "
            f"max {1e3 * gaps[-1]:6.1f} ms, {self.most >> 20:5} MiB, {self.after >> 20:5} after, "
            f"{len(self.statuses) / seconds:5.1f}/s {counts}"
        )


def bodies(model: str, size: int) -> dict[str, Body]:
    """Return a body of about `size` bytes of each kind."""
    text = ("The pilotfish swims ahead of the shark and keeps it company. " * (size // 60 + 1))[:size]
    prompt = json.dumps({"model": model, "prompt": text}).encode()
    message = {"role": "user", "content": text[:1000]}
    chat = "/v1/chat/completions"
    many = {"model": model, "messages": [message] * (size // 1035)}
    kinds = {
        "prompt": Body("/v1/completions", prompt),
        "gzip": Body("/v1/completions", gzip.compress(prompt, 1), {"Content-Encoding": "gzip"}),
        "message": Body(chat, json.dumps({"model": model, "messages": [{**message, "content": text}]}).encode()),
        "messages": Body(chat, json.dumps(many).encode()),
        "ids": Body("/v1/completions", json.dumps({"model": model, "prompt": [300] * (size // 5)}).encode()),
        "containers": Body("/v1/completions", b'{"prompt": [' + b"[]," * (size // 3) + b"1]}"),
        "detokenize": Body("/detokenize", json.dumps({"tokens": [300] * (size // 5)}).encode()),
        "tokenize": Body("/tokenize", json.dumps({"prompt": text}).encode()),
    }
    return kinds


def measure(url: str, pid: int, model: str, body: Body | None, clients: int, seconds: float) -> Seen:
    """Send `body` by that many clients for a time, and return what others see meanwhile."""
    seen, ended = Seen(), threading.Event()
    process = psutil.Process(pid)

    def health() -> None:
        with _connection(url) as connection:
            began = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            seen.health.append(time.perf_counter() - began)
        seen.most = max(seen.most, process.memory_info().rss)
        ended.wait(POLL_SECONDS)

    def stream() -> None:
        asked = {"model": model, "prompt": "The sea", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with _connection(url) as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked), HEADERS)
            response, last = connection.getresponse(), 0.0
            while not ended.is_set() and (line := response.readline()):
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last:
                        seen.gaps.append(now - last)
                    last = now

    with _sending(url, body, clients) as statuses:
        threads = _threads(ended, [health, stream])
        time.sleep(seconds)
        ended.set()
        for thread in threads:
            thread.join()
    seen.statuses = statuses
    time.sleep(SETTLE_SECONDS)
    seen.after = process.memory_info().rss
    return seen


def _threads(ended: threading.Event, works: Sequence[Callable[[], None]]) -> list[threading.Thread]:
    """Start a thread for each of these, which does it over and over until `ended`."""

    def repeat(work: Callable[[], None]) -> None:
        while not ended.is_set():
            work()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    return threads


@contextmanager
def _sending(url: str, body: Body | None, clients: int) -> Iterator[list[int]]:
    """Send `body` by that many clients in another process meanwhile; the list has the statuses once that has ended."""
    statuses: list[int] = []
    if body is None:
        yield statuses
        return
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_send, args=(url, body, clients, there))
    process.start()
    here.recv()
    try:
        yield statuses
    finally:
        here.send(None)
        statuses.extend(here.recv())
        process.join()


def _send(url: str, body: Body, clients: int, pipe: Connection) -> None:
    """Send `body` until something comes through the pipe, and answer with the statuses."""
    os.nice(10)
    ended = threading.Event()
    statuses: list[int] = []

    def send() -> None:
        with _connection(url) as connection:
            try:
                connection.request("POST", body.path, body.data, HEADERS | body.headers)
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
            except (OSError, http.client.HTTPException):  # an answer before the body was sent
                statuses.append(0)

    pipe.send(None)
    threads = _threads(ended, [send] * clients)
    pipe.recv()
    ended.set()
    for thread in threads:
        thread.join()
    pipe.send(statuses)


@contextmanager
def _connection(url: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        yield connection
    finally:
        connection.close()


def _p99(ordered: list[float]) -> float:
    return ordered[int(0.99 * (len(ordered) - 1))]


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            with _connection(url) as connection:
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return
        except OSError:
            pass
        assert process.poll() is None, "the server has ended"
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=7.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind")
    parser.add_argument("--kind", action="append", help="default: all of them")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pilotfish.server.cli.main", "serve", "--model", args.model, "--port", str(port)]
    command += ["--served-model-name", "m", "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_ready(url, process)
        kinds = bodies("m", int(args.megabytes * 10**6))
        measure(url, process.pid, "m", None, 0, 2.0)
        for name in (None, *(args.kind or kinds)):
            body = None if name is None else kinds[name]
            seen = measure(url, process.pid, "m", body, args.clients, args.seconds)
            print(seen.row(name or "none", args.seconds), flush=True)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
