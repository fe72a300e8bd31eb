"""smg, a router for language-model servers, in front of replicas: a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.ports import free_port

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120


def smg_command() -> str | None:
    """The path of smg: $SMG, that of `make test-replicas`, or the one on the PATH; None without any."""
    own = REPOSITORY / ".venv-replicas" / "bin" / "smg"
    return os.environ.get("SMG") or (str(own) if own.exists() else shutil.which("smg"))


class Gateway:
    """smg with some workers, whose URLs are given, and with more of its options. `api_key` is that of smg and of the
    workers. What it says is in `log`."""

    def __init__(
        self,
        log: Path,
        workers: Sequence[str],
        *options: str,
        policy: str = "cache_aware",
        api_key: str | None = None,
    ) -> None:
        command = smg_command()
        assert command is not None, "smg is not installed: make test-replicas installs it"
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        own = (
            "--host", "127.0.0.1", "--port", str(port), "--policy", policy,
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()),
            "--health-check-endpoint", "/ready", "--health-check-interval-secs", "1",
            "--health-failure-threshold", "1", "--health-success-threshold", "1", "--load-monitor-interval", "1",
        )  # fmt: skip
        urls = ("--worker-urls", *workers) if workers else ()
        if api_key is not None:
            options = (*options, "--api-key", api_key)
        with log.open("wb") as output:
            self.process = subprocess.Popen([command, "launch", *own, *urls, *options], stdout=output, stderr=output)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.wait_until(lambda: self._reachable() and len(self.ready()) == len(workers))

    def _reachable(self) -> bool:
        try:
            return self.http.get("/liveness").is_success
        except httpx.TransportError:
            return False

    def workers(self) -> dict[str, dict[str, Any]]:
        """What smg knows about its workers, by their URLs."""
        return {worker["url"]: worker for worker in self.http.get("/workers", headers=self._key).json()["workers"]}

    def ready(self) -> set[str]:
        """URLs of the workers that get requests."""
        return {url for url, worker in self.workers().items() if worker["status"] == "ready"}

    def add(self, url: str, **spec: Any) -> None:
        """Add a worker, and wait until it gets requests."""
        response = self.http.post("/workers", json={"url": url, **spec}, headers=self._key)
        assert response.is_success, response.text
        self.wait_until(lambda: url in self.ready())

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.05)

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
