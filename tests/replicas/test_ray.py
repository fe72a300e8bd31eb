"""docker/ray's application on a real local Ray: requests and streams pass, a replica that is killed is replaced, an
update fails no request, and there are more replicas under load and fewer after. `make test-replicas` runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.gateway import REPOSITORY
from tests.support.ports import free_port
from tests.support.running_server import MODEL, PROMPT

PYTHON = os.environ.get("RAY_PYTHON") or str(REPOSITORY / ".venv-ray" / "bin" / "python")

pytestmark = [
    pytest.mark.replicas,
    pytest.mark.skipif(shutil.which(PYTHON) is None, reason="Ray is not installed: make test-replicas installs it"),
]

TEXT: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 5, "ignore_eos": True}
SECONDS = 400
"""For replicas to start, on a machine that does other work."""


class LocalRay:
    """A local Ray, in a process of its own, and the application on it."""

    def __init__(self, log: Path, model: Path) -> None:
        port = free_port()
        self.url, self._model, self._log = f"http://127.0.0.1:{port}", model, log
        self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of Ray's sockets must be short
        driver = Path(__file__).with_name("ray_driver.py")
        modules = [str(REPOSITORY / "docker" / "ray"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [PYTHON, driver, str(port), self._folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(modules)},
            )  # fmt: skip
        assert self._read() == "ready"

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text(errors="replace")
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def deploy(self, *flags: str, **settings: Any) -> None:
        """Deploy the application, and wait until that is done."""
        own = ["--model", str(self._model), "--kv-cache-memory", "16MiB", "--num-threads", "1"]
        names = ["--served-model-name", MODEL]
        command = [sys.executable, "-m", "pilotfish.server.cli.main"]
        arguments = {"command": command, "flags": [*own, *names, *flags], "drain_seconds": 20, **settings}
        self.ask(do="deploy", arguments=arguments)

    def running(self) -> int:
        states: dict[str, int] = self.ask(do="states")
        return states.get("RUNNING", 0)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self._log.read_text(errors="replace")
            time.sleep(0.5)

    def servers(self) -> set[int]:
        """Process ids of the replicas' servers, whoever their parents are."""
        own = str(self._model)
        found = psutil.process_iter(["cmdline"])
        return {
            p.pid for p in found if own in (line := p.info["cmdline"] or []) and "serve" in line and line[0] != "sh"
        }

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    folder = tmp_path_factory.mktemp("ray")
    model = shutil.copytree(tiny_llama, folder / "model")  # so that its servers can be told from others
    started = LocalRay(folder / "log", model)
    try:
        yield started
    finally:
        started.stop()
        started.wait_until(lambda: not started.servers())  # they end with Ray


@contextmanager
def asking(url: str, clients: int = 2) -> Iterator[list[str]]:
    """Requests all the while, one after the other for each client. Yields what comes: texts, and errors."""
    stop, found = threading.Event(), list[str]()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            while not stop.is_set():
                try:
                    response = http.post("/v1/completions", json=TEXT)
                    whole = response.status_code == 200
                    found.append(response.json()["choices"][0]["text"] if whole else f"error {response.text}")
                except httpx.HTTPError as error:
                    found.append(f"error {error!r}")

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(ask) for _ in range(clients)]
        try:
            yield found
        finally:
            stop.set()
        for future in futures:
            future.result()


CHECK = """
import sys, yaml, pilotfish_serve
from ray.serve.schema import ServeDeploySchema
schema = ServeDeploySchema(**yaml.safe_load(open(sys.argv[1])))
(application,) = schema.applications
print(application.import_path, pilotfish_serve.build(application.args)._bound_deployment.name)
"""


def test_the_file_for_serve_is_one_that_ray_and_the_application_take() -> None:
    folder = REPOSITORY / "docker" / "ray"
    done = subprocess.run([PYTHON, "-c", CHECK, "serve.yaml"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pilotfish_serve:build", "pilotfish"]


def test_a_killed_replica_is_replaced_and_an_update_fails_no_request(ray: LocalRay) -> None:
    ray.deploy(replicas=2)
    with httpx.Client(base_url=ray.url, timeout=120) as http:
        text = http.post("/v1/completions", json=TEXT).json()["choices"][0]["text"]
        with http.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            chunks = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert chunks[-1] == "[DONE]"
        assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1]) == text
        wrong = http.post("/v1/completions", json=TEXT | {"temperature": 9}, headers={"x-request-id": "mine-1"})
        assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "mine-1")
    before = ray.servers()
    assert len(before) == 2
    with asking(ray.url) as found:
        ray.wait_until(lambda: len(found) > 4)
        ray.ask(do="kill")
        ray.wait_until(lambda: ray.running() == 2 and len(ray.servers() - before) == 1)
        done = len(found)
        ray.wait_until(lambda: len(found) > done + 4)
    assert len(ray.servers()) == 2  # that of the killed one has ended
    failed = [each for each in found if each != text]
    assert len(failed) <= 2  # what was in flight there, one for each client
    assert all(each.startswith("error") for each in failed)
    with asking(ray.url) as found:
        ray.deploy("--served-model-name", "newer", replicas=2)
        ray.wait_until(lambda: ray.running() == 2)
        done = len(found)
        ray.wait_until(lambda: len(found) > done + 4)
    assert set(found) == {text}
    for _ in range(6):  # whichever replica answers
        names = [model["id"] for model in httpx.get(f"{ray.url}/v1/models", timeout=60).json()["data"]]
        assert names == [MODEL, "newer"]


def test_there_are_more_replicas_under_load_and_fewer_after(ray: LocalRay) -> None:
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1,
        "downscale_delay_s": 3, "metrics_interval_s": 0.5, "look_back_period_s": 2,
    }  # fmt: skip
    ray.deploy(autoscaling=scaling)
    ray.wait_until(lambda: ray.running() == 1)
    with asking(ray.url, clients=10) as found:
        ray.wait_until(lambda: ray.running() == 2)
        done = len(found)
        ray.wait_until(lambda: len(found) > done + 20)
    assert len(set(found)) == 1
    assert not found[0].startswith("error")
    ray.wait_until(lambda: ray.running() == 1)
    assert httpx.post(f"{ray.url}/v1/completions", json=TEXT, timeout=120).json()["choices"][0]["text"] == found[0]
