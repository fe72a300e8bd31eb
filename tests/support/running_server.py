"""A real server for tests: `pilotfish serve` in a process of its own, with a real engine in another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests.support.ports import free_port

READY_SECONDS = 180

MODEL = "llama"
"""The model's name in a server of the fixture tiny_llama's folder."""
PROMPT = "The sea was calm and the light on the water"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is light?"}]
FIXED: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 5, "extra_body": {"ignore_eos": True}}
"""A completion that is the same each time, and as long as max_tokens."""


class RunningServer:
    """`flags` are those of `pilotfish serve`; what the process says is in `log`. `variables` are added to the
    environment. `own_group`: it leads a process group, which `signal_group` reaches. `open_files`: its limit on these;
    0: that of this process."""

    def __init__(
        self,
        log: Path,
        *flags: str,
        variables: Mapping[str, str] | None = None,
        own_group: bool = False,
        open_files: int = 0,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "pilotfish.server.cli.main", "serve", "--port", str(port), *flags]
        if open_files:
            command = ["prlimit", f"--nofile={open_files}:{open_files}", *command]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **(variables or {})},
                start_new_session=own_group,
            )
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client, without its retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=60, **{"api_key": "none"} | options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def status(self, path: str) -> int | None:
        """The status of a GET, or None while nothing listens."""
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            return None

    def wait_until(self, condition: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for(self, path: str, status: int) -> None:
        """Until a GET is answered with this status."""
        self.wait_until(lambda: self.status(path) == status)

    def metric(self, name: str) -> float:
        """A sample of /metrics, by its name and labels as they stand there."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (child,) = [each for each in self._children() if "pilotfish.engine.process.main" in each.cmdline()]
        return child

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def signal_group(self, number: int) -> None:
        """Signals server and engine alike, as a service manager or a terminal does."""
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def tokens_of(server: RunningServer, text: str) -> list[int]:
    """The token ids of a text, by /tokenize."""
    response = server.http.post("/tokenize", json={"model": MODEL, "prompt": text})
    assert response.status_code == 200
    tokens: list[int] = response.json()["tokens"]
    return tokens
