"""The chunks per second that the server writes: the real application under uvicorn, with an engine that takes no time.

    python benchmarks/stream_throughput.py --streams 256 --tokens 200

The server runs in a process of its own, with a stand-in for the engine: each of its steps yields one token for every
stream, and the next one begins once all of them have been taken, so the path from a delta to a socket is measured. The
client, in this process, only counts. Reported are chunks per second of wall time and, less sensitive to other load on
the machine, the server's CPU time (user and system) per chunk and the chunks per second of that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import psutil
import uvicorn

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.request import Delta, EngineInfo, Request, TokenLogprobs
from pilotfish.server.app import create_app
from pilotfish.server.config import ServerConfig
from pilotfish.server.metrics import Metrics
from pilotfish.server.serve import loop_factory

VOCABULARY = 1000
MODEL = "instant"
EVENT = b"data: "
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class InstantEngine:
    """AsyncEngine's interface, with a token for every stream at each step of no duration."""

    def __init__(self) -> None:
        self.config = EngineConfig(model=MODEL)
        self.state = "ready"
        self.error = None
        self.info = EngineInfo(
            model=MODEL,
            vocab_size=VOCABULARY,
            max_model_len=1_000_000,
            eos_token_ids=(),
            num_blocks=1,
            block_size=16,
            max_num_seqs=100_000,
            drafters=(),
            default_drafter="off",
            dtype="none",
            device="none",
            kernels="none",
            load_seconds=0.0,
        )
        self._queues: dict[str, asyncio.Queue[Delta]] = {}
        self._left: dict[str, Request] = {}
        self._made: dict[str, int] = {}
        self._work = asyncio.Event()
        self._steps = asyncio.create_task(self._run())

    def draw_seed(self) -> int:
        return 0

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        queue = self._queues[request.id] = asyncio.Queue()
        self._left[request.id] = request
        self._made[request.id] = 0
        self._work.set()
        try:
            while True:
                delta = await queue.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._left.pop(request.id, None)
            del self._queues[request.id]

    async def stop(self) -> None:
        self._steps.cancel()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._left:
                for request in list(self._left.values()):
                    self._step(request)
                while any(not queue.empty() for queue in self._queues.values()):  # noqa: ASYNC110 - no event says so
                    await asyncio.sleep(0)

    def _step(self, request: Request) -> None:
        made = self._made[request.id]
        self._made[request.id] = made + 1
        last = made + 1 == request.params.max_tokens
        token = made % VOCABULARY
        logprobs = None
        if (top := request.params.logprobs) is not None:
            logprobs = (TokenLogprobs(token, -0.5, tuple((i, -1.0 - i) for i in range(top))),)
        delta = Delta(
            request_id=request.id,
            token_ids=(token,),
            logprobs=logprobs,
            scheduled=request.arrival if made == 0 else None,
            finish_reason="length" if last else None,
        )
        self._queues[request.id].put_nowait(delta)
        if last:
            del self._left[request.id]


class Words:
    """A tokenizer whose every token is a short word."""

    special_ids: frozenset[int] = frozenset()
    chat_template = "none"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, 2, 3]

    def token_bytes(self, id: int, /) -> bytes:
        return b" word%d" % id

    def token(self, id: int, /) -> str:
        return self.token_bytes(id).decode()

    def shield(self, text: str) -> str:
        return text

    def unshield(self, text: str) -> str:
        return text

    def apply_chat_template(self, messages: Sequence[Any], *arguments: Any, **variables: Any) -> str:
        return "words"


async def serve(port: int) -> None:
    app = create_app(InstantEngine(), Words(), ServerConfig(), Metrics(), (MODEL,))  # type: ignore[arg-type]
    config = uvicorn.Config(app, port=port, log_config=None, access_log=False, ws="none", backlog=2048)
    await uvicorn.Server(config).serve()


def request(endpoint: str, tokens: int, logprobs: int) -> bytes:
    body: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": tokens}
    if endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": "Say something."}]}
        body |= {"logprobs": True, "top_logprobs": logprobs} if logprobs else {}
    else:
        body |= {"prompt": "Say something."} | ({"logprobs": logprobs} if logprobs else {})
    text = json.dumps(body).encode()
    head = f"POST {PATHS[endpoint]} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


def stream(port: int, asked: bytes, streams: int) -> int:
    """Send the request on that many connections, read all answers to their ends; returns the chunks that came."""
    counted = 0
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            one = socket.create_connection(("127.0.0.1", port))
            one.sendall(asked)
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ, [b""])
        while selector.get_map():
            for key, _ in selector.select():
                data = key.fileobj.recv(2**18)  # type: ignore[union-attr]
                window = key.data[0] + data
                counted += window.count(EVENT)
                key.data[0] = window[-len(EVENT) + 1 :]
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return counted - streams  # [DONE] is not a chunk


def measure(endpoint: str, streams: int, tokens: int, logprobs: int, runs: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.05)
        watched = psutil.Process(process.pid)
        stream(port, request(endpoint, 20, logprobs), streams)  # imports, caches
        rates, costs = [], []
        for _ in range(runs):
            before, began = watched.cpu_times(), time.perf_counter()
            chunks = stream(port, request(endpoint, tokens, logprobs), streams)
            seconds, after = time.perf_counter() - began, watched.cpu_times()
            assert chunks >= streams * tokens, f"only {chunks} chunks came"
            rates.append(chunks / seconds)
            costs.append((after.user + after.system - before.user - before.system) / chunks)
    finally:
        process.terminate()
        process.wait()
    rate, cost = statistics.median(rates), statistics.median(costs)
    print(
        f"{endpoint:<12} {rate:6.0f} chunks/s (best {max(rates):.0f}), {cost * 1e6:.1f} us of CPU a chunk "
        f"(best {min(costs) * 1e6:.1f}), {1 / cost:.0f} chunks per second of CPU",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", choices=tuple(PATHS), action="append", help="default: all of them")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--logprobs", type=int, default=0, help="likeliest tokens to list with each token; 0: none")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(args.serve))
        return
    for endpoint in args.endpoint or PATHS:
        measure(endpoint, args.streams, args.tokens, args.logprobs, args.runs)


if __name__ == "__main__":
    main()
