"""A real Prometheus for tests, which scrapes one server every second, by the configuration in docker/prometheus."""

from __future__ import annotations

import math
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.deployment import PROMETHEUS, documents

SCRAPE_SECONDS = 1
READY_SECONDS = 30


@dataclass(frozen=True)
class Series:
    """What a query brought: `values` are those of its range, or the one of an instant."""

    labels: dict[str, str]
    values: list[float]

    @property
    def numbers(self) -> list[float]:
        """Without those that are no numbers: a rate over nothing."""
        return [value for value in self.values if math.isfinite(value)]


class RunningPrometheus:
    """Its files and its log are in `folder`. Raises AssertionError if it does not start."""

    def __init__(self, program: str, folder: Path, target: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        (configuration,) = documents(PROMETHEUS / "prometheus.yml")
        each = f"{SCRAPE_SECONDS}s"
        configuration["global"] |= {"scrape_interval": each, "scrape_timeout": each, "evaluation_interval": each}
        configuration["rule_files"] = [str(PROMETHEUS / path) for path in configuration["rule_files"]]
        configuration["scrape_configs"] = [
            {"job_name": job["job_name"], "static_configs": [{"targets": [target]}]}
            for job in configuration["scrape_configs"]
            if job["job_name"] == "pilotfish"
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self.log = folder / "log"
        command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=output, stderr=output)
        self.http = httpx.Client(base_url=f"http://{address}", timeout=10)
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _get(self, path: str, **parameters: object) -> Any:
        answer = self.http.get(path, params={name: str(value) for name, value in parameters.items()}).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def instant(self, expression: str) -> list[Series]:
        data = self._get("/api/v1/query", query=expression)
        assert data["resultType"] == "vector", expression
        return [Series(series["metric"], [float(series["value"][1])]) for series in data["result"]]

    def range(self, expression: str, begin: float, end: float) -> list[Series]:
        """Every second from `begin` to `end`, in seconds since 1970."""
        data = self._get("/api/v1/query_range", query=expression, start=begin, end=end, step=1)
        assert data["resultType"] == "matrix", expression
        return [Series(series["metric"], [float(value) for _, value in series["values"]]) for series in data["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """As Prometheus has loaded and evaluated them."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def scrapes(self) -> int:
        """Those of the server that went well."""
        found = self.instant('sum(count_over_time(up{job="pilotfish"}[1h])) * min(up{job="pilotfish"})')
        return int(found[0].values[0]) if found else 0

    def wait_for_scrapes(self, count: int) -> None:
        """`count` more."""
        wanted = self.scrapes() + count
        deadline = time.monotonic() + count * SCRAPE_SECONDS + READY_SECONDS
        while self.scrapes() < wanted:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
