"""Slow clients, many connections, long heads, descriptors that run out: a clear end for them, nothing for others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn

from pilotfish.server.connections import BODY_RATE, LARGEST_HEAD, ConnectionLimits, most_connections
from pilotfish.server.http_protocol import LimitedProtocol
from tests.support.running_server import RunningServer

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
PATIENCE = 0.4
MOST = 8
CHUNK = bytes(2**16)


class Application:
    """Answers a GET with "ok", a GET of /large with an endless body, and a POST with the length of its body."""

    def __init__(self) -> None:
        self.left = threading.Event()
        """Set when a client is gone before the answer's end."""
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return self.left.set()
            size, more = size + len(message["body"]), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        waiting = asyncio.ensure_future(receive())
        while scope["path"] == "/large" and not waiting.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            self.sent += len(CHUNK)
            await asyncio.sleep(0)
        if waiting.done():
            return self.left.set()
        waiting.cancel()
        await send({"type": "http.response.body", "body": b"%d ok" % size})


@contextlib.contextmanager
def listening(limits: ConnectionLimits, app: Application) -> Iterator[int]:
    """The port of a server of `app` in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        protocol: Any = partial(LimitedProtocol, limits=limits)
        server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def ended() -> list[str]:
    return []


@pytest.fixture
def app() -> Application:
    return Application()


@pytest.fixture
def port(ended: list[str], app: Application) -> Iterator[int]:
    limits = ConnectionLimits(most=MOST, patience=PATIENCE, idle=2.0, count=ended.append)
    with listening(limits, app) as found:
        yield found


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(connection: socket.socket) -> bytes:
    """All that still comes, until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(2**16):
            received += more
    return received


def works(port: int) -> bool:
    with connected(port) as connection:
        connection.sendall(GET)
        return connection.recv(1000).startswith(b"HTTP/1.1 200")


def drip(connection: socket.socket, content: bytes, seconds: float) -> None:
    """Send a byte now and then, as long as it takes."""
    for byte in content:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(seconds)


@pytest.mark.parametrize(
    ("begin", "then"),
    [
        (b"G", b"ET /" + b"x" * 40),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X" * 40),
        (b"\r\n", b"\r\n" * 20),
        (GET + b"GET /", b"x" * 40),
    ],
    ids=["method", "headers", "empty lines", "the second"],
)
def test_a_head_that_never_ends_is_closed(port: int, ended: list[str], begin: bytes, then: bytes) -> None:
    start = time.monotonic()
    with connected(port) as connection:
        connection.sendall(begin)
        dripping = threading.Thread(target=drip, args=(connection, then, PATIENCE / 4))
        dripping.start()
        answer = rest(connection)
        took = time.monotonic() - start
        dripping.join()
    assert b"408" in answer
    assert ended == ["head"]
    assert PATIENCE * 0.9 < took < PATIENCE * 6
    assert works(port)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * (LARGEST_HEAD * 4),
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * LARGEST_HEAD,
        b"GET /" + b"x" * (LARGEST_HEAD + 1) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * (LARGEST_HEAD + 1) + b"\r\n\r\n",
    ],
    ids=["one endless header", "endless headers", "a long address", "a long header"],
)
def test_a_head_that_is_too_long_is_refused(port: int, ended: list[str], head: bytes) -> None:
    with connected(port) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head)
        assert rest(connection).startswith(b"HTTP/1.1 431")
    assert ended == ["head"]
    assert works(port)


def test_a_long_head_is_taken(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET[:-2] + b"X: " + b"x" * (LARGEST_HEAD - 100) + b"\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_body_that_never_ends_is_closed(port: int, ended: list[str], app: Application) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        dripping = threading.Thread(target=drip, args=(connection, b"X" * 40, PATIENCE / 4))
        dripping.start()
        assert rest(connection).startswith(b"HTTP/1.1 408")
        dripping.join()
    assert ended == ["body"]
    assert app.left.wait(5)
    assert works(port)


def test_a_body_that_comes_fast_enough_may_take_its_time(port: int, ended: list[str]) -> None:
    parts = 8
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (parts * BODY_RATE))
        for _ in range(parts):
            connection.sendall(bytes(BODY_RATE))
            time.sleep(PATIENCE / 4)
        assert b"%d ok" % (parts * BODY_RATE) in connection.recv(1000) + connection.recv(1000)
    assert ended == []


def test_a_connection_may_be_idle_for_a_while(port: int, ended: list[str]) -> None:
    with connected(port) as connection:
        for _ in range(2):
            time.sleep(PATIENCE * 2)
            connection.sendall(GET)
            assert b"200" in connection.recv(1000)
    with connected(port) as connection:
        start = time.monotonic()
        assert rest(connection) == b""
        assert 1.5 < time.monotonic() - start < 8
    assert ended == []


def test_a_client_that_does_not_read_is_cut_and_takes_no_memory(port: int, ended: list[str], app: Application) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert works(port)
        assert app.left.wait(PATIENCE * 20)
    assert ended == ["answer"]
    assert app.sent < 2**21, "what is not read is not written"


def test_a_client_that_reads_slowly_but_reads_is_not_cut(port: int, ended: list[str]) -> None:
    with connected(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        end = time.monotonic() + PATIENCE * 4
        while time.monotonic() < end:
            assert connection.recv(2**18)
            time.sleep(PATIENCE / 20)
        assert ended == []


def test_connections_beyond_the_limit_get_an_answer(port: int, ended: list[str]) -> None:
    held = [connected(port) for _ in range(MOST)]
    held[-1].sendall(GET)
    assert b"200" in held[-1].recv(1000)  # all of them are accepted
    for send in (b"", GET):
        with connected(port) as connection:
            connection.sendall(send)
            answer = rest(connection)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"retry-after: 1" in answer
            assert answer.endswith(b"Try again later.")
    assert ended == ["limit"] * 2
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 10
    while not works(port):
        assert time.monotonic() < deadline


def test_limits_follow_the_limit_on_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [64, 256]

    def setrlimit(what: int, limits: tuple[int, int]) -> None:
        found[0] = limits[0]

    monkeypatch.setattr(resource, "getrlimit", lambda what: tuple(found))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    free = 256 - 64 - len(os.listdir("/proc/self/fd"))
    assert abs(most_connections(0) - free) < 8
    assert found == [256, 256], "the soft limit is raised to the hard one"
    assert most_connections(5) == 5
    assert abs(most_connections(10**6) - free) < 8


# The real server

LONG = bool(os.environ.get("PILOTFISH_LONG"))


@pytest.mark.process
def test_idle_and_short_connections_leave_nothing_behind(server: RunningServer) -> None:
    """2,000 that are idle, and 300 a second that are opened and closed: for a minute, or a few seconds in CI."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    seconds = 60 if LONG else 3
    process = psutil.Process(server.process.pid)
    assert server.status("/health") == 200
    before = process.num_fds()
    port = int(server.url.rpartition(":")[2])
    held = [connected(port) for _ in range(2000)]
    try:
        server.wait_until(lambda: server.metric("pilotfish_connections") >= 2000, 30)
        begin = time.monotonic()
        for i in range(300 * seconds):
            with connected(port) as connection:
                if i % 3:
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"[: 20 if i % 3 == 1 else None])
            if i % 150 == 0:
                assert server.status("/health") == 200
            time.sleep(max(0.0, begin + i / 300 - time.monotonic()))
        assert server.metric("pilotfish_connections") >= 2000, "they are still held"
    finally:
        for connection in held:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.wait_until(lambda: process.num_fds() <= before + 4, 30)
    assert server.metric("pilotfish_connections") <= 4


@pytest.mark.process
def test_without_descriptors_connections_are_refused_and_the_server_recovers(tiny_llama: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--speculation", "none")
    limited = RunningServer(tmp_path / "log", *flags, open_files=128)
    try:
        limited.wait_for("/ready", 200)
        port = int(limited.url.rpartition(":")[2])
        held = [connected(port) for _ in range(100)]
        answers = []
        for connection in held:
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                answers.append(connection.recv(1000))
        assert len([each for each in answers if each.startswith(b"HTTP/1.1 503")]) > 10
        assert limited.status("/health") == 200, "a connection that was there before goes on"
        for connection in held:
            connection.close()
        limited.wait_until(lambda: works_at(port, b"/health"), 20)
        answer = limited.http.post("/v1/completions", json={"model": "llama", "prompt": "a", "max_tokens": 4})
        assert answer.status_code == 200
        assert limited.metric('pilotfish_connections_ended_total{reason="limit"}') > 10
        assert "connections were refused" in limited.log.read_text()
    finally:
        limited.stop()


def works_at(port: int, path: bytes) -> bool:
    with connected(port) as connection:
        connection.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path)
        return connection.recv(1000).startswith(b"HTTP/1.1 200")
