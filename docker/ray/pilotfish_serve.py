"""Pilotfish as an application of Ray Serve: each replica is a `pilotfish serve` in a process of its own, to which
requests are passed on as they are, streams included. Ray decides how many there are, starts them anew when they fail,
and replaces them in rolling updates. docs/replicas.md says how to start it; the settings are `Settings`.

Ray's environment needs no Pilotfish: `command` may be the path of another one's.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

POLL_SECONDS = 0.2
HEALTH_SECONDS = 5.0
GETS_UP_AGAIN = ("engine_restarting", "draining")
"""What /ready says of a server that needs no help."""
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "host", "content-length",
})  # fmt: skip
"""Headers that belong to a connection (RFC 9110, 7.6.1), and those that are made anew."""

UNTIL_PARENT_ENDS = 'exec 3<&0; "$@" 3<&- & child=$!; { cat <&3 > /dev/null; kill -TERM $child; } & wait $child'
"""Runs a command, and sends it SIGTERM, which drains it, when its standard input closes: however its parent ends."""


class Settings(BaseModel):
    """The application's arguments."""

    model_config = ConfigDict(extra="forbid")

    command: list[str] = ["pilotfish"]
    flags: list[str] = []
    """Of `pilotfish serve`, but for --host, --port and --tensor-parallel-size."""
    replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] | None = None
    """Instead of `replicas`, Ray's AutoscalingConfig: min_replicas, max_replicas, target_ongoing_requests, ..."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks of a replica, all on one host."""
    cpus_per_rank: float = Field(1, ge=0)
    gpus_per_rank: float = Field(0, ge=0)
    max_ongoing_requests: int = Field(512, ge=1)
    """Requests that a replica is given at a time: as many as it may queue, so that it knows of them (tenants have equal
    shares there)."""
    drain_seconds: float = Field(60, ge=0)
    """How long a replica that is taken away may go on with its requests."""


class Replica:
    """A server, and what passes requests on to it. Raises RuntimeError if it ends before it is ready."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = Settings(**settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        own = ["--host", "127.0.0.1", "--port", str(port)]
        if self._settings.tensor_parallel_size > 1:
            own += ["--tensor-parallel-size", str(self._settings.tensor_parallel_size)]
        command = [*self._settings.command, "serve", *self._settings.flags, *own]
        self._process = subprocess.Popen(["sh", "-c", UNTIL_PARENT_ENDS, "sh", *command], stdin=subprocess.PIPE)
        self._client: aiohttp.ClientSession | None = None
        while not self._ready():
            if (status := self._process.poll()) is not None:
                raise RuntimeError(f"{' '.join(command)} has ended with status {status}: the replica's log says why")
            time.sleep(POLL_SECONDS)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/ready", timeout=HEALTH_SECONDS) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._client is None:  # it belongs to the loop in which requests come
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=HEALTH_SECONDS)
            self._client = aiohttp.ClientSession(
                self._url, timeout=timeout, auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
            )
        return self._client

    async def check_health(self) -> None:
        """Raise RuntimeError for a server that only a new one helps; Ray then replaces this replica."""
        if (status := self._process.poll()) is not None:
            raise RuntimeError(f"the server has ended with status {status}")
        timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        async with self._http.get("/ready", timeout=timeout) as response:
            if response.status == 200:
                return
            reason = (await response.json()).get("status")
        if reason not in GETS_UP_AGAIN:
            raise RuntimeError(f"the server is not ready: {reason}")

    async def __call__(self, request: Request) -> Response:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        try:
            answer = await self._http.request(
                request.method, path, headers=headers, data=await request.body(), allow_redirects=False
            )
        except aiohttp.ClientError as error:
            message = f"This replica's server does not answer: {error}. Try again."
            body = {"error": {"message": message, "type": "server_error", "param": None, "code": "replica_gone"}}
            return JSONResponse(body, 503, {"retry-after": "1"})
        left_out = HOP_BY_HOP | {"x-request-id"}  # which Ray adds
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in left_out}
        return StreamingResponse(_chunks(answer), answer.status, kept)

    async def __del__(self) -> None:
        """Have the server drain and end; Ray calls this when no request is left, or after `drain_seconds`."""
        if self._client is not None:
            await self._client.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, HEALTH_SECONDS)


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for chunk in answer.content.iter_any():
            yield chunk


def build(arguments: dict[str, Any]) -> Application:
    """Return the application. Raises pydantic's ValidationError for arguments that are none."""
    settings = Settings(**arguments)
    ranks = settings.tensor_parallel_size
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.autoscaling is not None:
        scaling = {"autoscaling_config": AutoscalingConfig(**settings.autoscaling)}
    deployment = serve.deployment(
        Replica,
        name="pilotfish",
        max_ongoing_requests=settings.max_ongoing_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        ray_actor_options={"num_cpus": ranks * settings.cpus_per_rank, "num_gpus": ranks * settings.gpus_per_rank},
        **scaling,
    )
    return deployment.bind(settings.model_dump())
