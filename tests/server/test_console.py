"""Output that cannot be written stops nothing: signals act first, and what is printed afterwards may be lost."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pilotfish.server.console import Console
from tests.support.ports import free_port
from tests.support.running_server import READY_SECONDS


class Full(io.StringIO):
    """A stream whose disk is full, or a terminal that has gone."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("terminal", [False, True])
def test_what_cannot_be_written_is_lost(terminal: bool) -> None:
    console = Console(Full(terminal))
    console.line("a")
    console.progress("b", 0.5)
    console.error("c")


@pytest.mark.process
@pytest.mark.parametrize("form", ["text", "json"])
def test_sigterm_drains_though_nothing_can_be_written(tiny_llama: Path, form: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pilotfish.server.cli.main", "serve", "--port", str(port), "--log-format", form]
    command += ["--model", str(tiny_llama), "--kv-cache-memory", "8MiB", "--speculation", "none"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=full, stderr=full, env=dict(os.environ))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=60)) as http:
            for _ in range(READY_SECONDS * 5):
                if http.get("/ready").status_code == 200:
                    break
                assert process.poll() is None
                signal.sigtimedwait([], 0.2)
            body = {"model": "llama", "prompt": "a", "max_tokens": 3, "unknown": 5}
            assert http.post("/v1/completions", json=body).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
