"""The files that start Pilotfish elsewhere, each by a validator that knows its form: the Dockerfile, compose,
Kubernetes, systemd. That the image builds and serves is seen by docker/test/image.sh.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.settings import settings_of
from pilotfish.server.config import ServerConfig
from tests.support.deployment import DOCKER, PROMETHEUS, ROOT, documents

pytestmark = pytest.mark.docker

KUBERNETES = DOCKER / "kubernetes"
SPECIAL_VARIABLES = {"PILOTFISH_API_KEY", "PILOTFISH_API_KEY_FILE", "PILOTFISH_CACHE"}


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (
        document for path in KUBERNETES.glob("*.yaml") for document in documents(path) if kind_of(document) == kind
    )
    return found


def kind_of(document: dict[str, Any]) -> str | None:
    return document.get("kind")


@pytest.mark.parametrize("file", ["Dockerfile", "docker/smg/Dockerfile"])
def test_dockerfile(file: str, tool: Callable[..., str]) -> None:
    run(tool("hadolint"), file)


def test_the_context_has_what_the_dockerfile_copies() -> None:
    """.dockerignore leaves everything out but what it names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_compose(tool: Callable[..., str]) -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_compose_mounts_files_that_exist() -> None:
    (compose,) = documents(DOCKER / "compose.yaml")
    services = compose["services"].values()
    sources = [volume.split(":")[0] for service in services for volume in service.get("volumes", ())]
    assert sources
    for source in sources:
        assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], source


def test_secrets_are_made_once_and_ignored_by_git(tmp_path: Path) -> None:
    (compose,) = documents(DOCKER / "compose.yaml")
    script = shutil.copy(DOCKER / "secrets.sh", tmp_path)
    run("bash", script)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {f"./secrets/{name}" for name in made} == {secret["file"] for secret in compose["secrets"].values()}
    assert all(len(text) == 32 and text.strip() == text for text in made.values())
    run("bash", script)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made
    run("git", "check-ignore", "docker/secrets/api_key")


def test_environment_variables_are_settings() -> None:
    """What compose, Kubernetes, the unit and the image set are settings by their names."""
    known = {
        f"PILOTFISH_{setting.name.upper()}" for setting in (*settings_of(EngineConfig), *settings_of(ServerConfig))
    }
    files = [
        ROOT / "Dockerfile",
        KUBERNETES / "pilotfish.yaml",
        KUBERNETES / "several-hosts.yaml",
        DOCKER / "systemd" / "pilotfish.service",
    ]
    used = {
        name
        for file in files
        for name in re.findall(r"(?:Environment=|name: |^ +)(PILOTFISH_\w+)", file.read_text(), re.M)
    }
    (compose,) = documents(DOCKER / "compose.yaml")
    for service in ("pilotfish-gpu", "replica-1"):
        used |= set(compose["services"][service]["environment"])
    assert len(used) > 5
    assert used <= known | SPECIAL_VARIABLES


def test_deployments_for_gpus_ask_for_one() -> None:
    """So they never serve from the CPU beside a GPU, or without one."""
    (compose,) = documents(DOCKER / "compose.yaml")
    assert compose["services"]["pilotfish-gpu"]["environment"] == {
        **compose["x-server"]["environment"],
        "PILOTFISH_DEVICE": "cuda",
    }
    assert "PILOTFISH_DEVICE" not in compose["services"]["pilotfish-cpu"]["environment"]
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"name": "PILOTFISH_DEVICE", "value": "cuda"} in container["env"]
    assert "\nEnvironment=PILOTFISH_DEVICE=cuda\n" in (DOCKER / "systemd" / "pilotfish.service").read_text()
    for path in (ROOT / "configs").glob("llama-*.yaml"):
        (settings,) = documents(path)
        assert settings["device"] == "cuda", path


@pytest.mark.parametrize("file", ["pilotfish.yaml", "autoscaling.yaml"])
def test_kubernetes(file: str, tool: Callable[..., str]) -> None:
    run(tool("kubernetes-validate"), "--strict", KUBERNETES / file)


def test_service_monitor(package: Callable[[str], ModuleType]) -> None:
    """By prometheus-operator's own definition, and nothing in it that this does not know."""
    operator = package("cloudcoil.models.prometheus_operator.v1")
    content = manifest("ServiceMonitor")
    read = operator.ServiceMonitor.model_validate(content)
    assert read.model_dump(by_alias=True, exclude_none=True, mode="json") == content


def test_kubernetes_manifests_fit_together() -> None:
    deployment, service, monitor = manifest("Deployment"), manifest("Service"), manifest("ServiceMonitor")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert labels[monitor["spec"]["jobLabel"]] == "pilotfish"  # the job that rules and dashboards know
    (port,), (endpoint,) = service["spec"]["ports"], monitor["spec"]["endpoints"]
    assert port["targetPort"] == container["ports"][0]["name"]
    assert endpoint["port"] == port["name"]
    scaler = manifest("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = (metric["pods"]["metric"]["name"] for metric in scaler["metrics"])
    (adapter,) = documents(KUBERNETES / "prometheus-adapter-values.yaml")
    assert adapter["rules"]["custom"][0]["seriesQuery"].startswith(f"{metric}{{")
    assert f"`{metric}`" in (ROOT / "docs" / "metrics.md").read_text()


def test_kubernetes_sets_no_variables_that_look_like_settings() -> None:
    """For a Service named pilotfish it would set PILOTFISH_PORT=tcp://..., among others."""
    assert manifest("Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_there_is_time_to_drain() -> None:
    """Who starts the server waits longer for its end than it drains."""
    (compose,) = documents(DOCKER / "compose.yaml")
    server = compose["x-server"]
    assert int(server["stop_grace_period"].rstrip("s")) > float(server["environment"]["PILOTFISH_DRAIN_TIMEOUT"]) + 5
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (drain,) = (float(item["value"]) for item in container["env"] if item["name"] == "PILOTFISH_DRAIN_TIMEOUT")
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + drain + 5
    unit = (DOCKER / "systemd" / "pilotfish.service").read_text()
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) > ServerConfig().drain_timeout + 5


def test_systemd_unit(tool: Callable[..., str], systemd_root: Path) -> None:
    unit = "pilotfish.service"
    said = run(tool("systemd-analyze", "systemd"), "verify", f"--root={systemd_root}", f"/etc/systemd/system/{unit}")
    assert unit not in said, said


@pytest.fixture
def systemd_root(tmp_path: Path) -> Path:
    """A root file system with the unit, what it is ordered after, and the program that it starts."""
    units = tmp_path / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    shutil.copy(DOCKER / "systemd" / "pilotfish.service", units)
    for name in ("network-online", "multi-user", "sysinit", "basic", "shutdown"):
        (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\n")
    program = tmp_path / "opt" / "pilotfish" / "bin" / "pilotfish"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def test_prometheus_scrapes_what_compose_starts() -> None:
    (compose,), (prometheus,) = documents(DOCKER / "compose.yaml"), documents(PROMETHEUS / "prometheus.yml")
    jobs = {job["job_name"]: job.get("dns_sd_configs", ()) for job in prometheus["scrape_configs"]}
    services = compose["services"]
    ((servers,), (router,)) = jobs["pilotfish"], jobs["smg"]
    (alias,) = servers["names"]
    for name, service in services.items():
        if name.startswith(("pilotfish-", "replica-")):
            assert alias in service["networks"]["default"]["aliases"], name
    assert compose["x-server"]["ports"][0].endswith(f":{servers['port']}")
    (name,) = router["names"]
    assert f"--prometheus-port={router['port']}" in services[name]["command"]


def test_the_router_of_compose_knows_all_replicas_and_asks_whether_they_are_ready() -> None:
    (compose,) = documents(DOCKER / "compose.yaml")
    services = compose["services"]
    replicas = {name for name, service in services.items() if service.get("profiles") == ["replicas"]} - {"smg"}
    assert len(replicas) == 3
    (port,) = (word.removeprefix("--port=") for word in services["smg"]["command"] if word.startswith("--port="))
    urls = {word for word in services["smg"]["command"] if word.startswith("http://")}
    assert urls == {f"http://{name}:{port}" for name in replicas}
    assert "--health-check-endpoint=/ready" in services["smg"]["command"]
    for name in replicas:
        assert services[name]["ports"] == []  # smg has the port of this machine
        assert services[name]["environment"] == {
            **compose["x-server"]["environment"],
            "PILOTFISH_DRAIN_ENDPOINT": "true",
        }
    (version,) = re.findall("^ARG SMG_VERSION=(.*)$", (DOCKER / "smg" / "Dockerfile").read_text(), re.MULTILINE)
    assert services["smg"]["image"] == f"pilotfish-smg:{version}"
    assert f"smg=={version}\n" in (ROOT / "tests" / "replicas" / "requirements.txt").read_text()


def test_the_unit_sees_the_card() -> None:
    """What systemd turns into a DeviceAllow= of its own closes /dev/nvidia* before version 252."""
    unit = (DOCKER / "systemd" / "pilotfish.service").read_text()
    for setting in ("ProtectClock", "PrivateDevices", "DevicePolicy"):
        assert not re.search(rf"^{setting}=", unit, re.MULTILINE), setting
    assert re.search("^LimitMEMLOCK=infinity$", unit, re.MULTILINE)
    (compose,) = documents(DOCKER / "compose.yaml")
    assert compose["services"]["pilotfish-gpu"]["ulimits"] == {"memlock": -1}


def test_what_a_gpu_host_installs_is_pinned_and_compiles_nothing() -> None:
    """flash-attn-4 is a beta that newer versions of what it stands on break; flash-attn 2 is there as sources alone."""
    listed = run(sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "extras", "cuda").splitlines()
    names = [re.split(r"[\[=<>;]", line)[0] for line in listed]
    assert names[0] == "flash-attn-4"
    assert "flash-attn" not in names
    assert all(re.match(r"[a-z0-9-]+(\[cu13\])?==[0-9a-z.]+; platform_system == 'Linux'$", line) for line in listed)
    assert not run(sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "extras").strip()


def test_flash_attn_4_is_installed_over_flash_attn_2() -> None:
    """The latter's wheel has an old flash_attn/cute, which would replace the former's."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    built, installed = dockerfile.index('"${FLASH_ATTN_2}" \\'), dockerfile.index("-r /requirements/cuda.txt;")
    assert built < installed
    assert "FLASH_ATTN_CUDA_ARCHS=" in dockerfile[:built]


def test_triton_has_a_compiler_where_it_runs() -> None:
    _, _, server = (ROOT / "Dockerfile").read_text().partition(" AS server\n")
    assert re.search(r'if \[ "\$\{VARIANT\}" = cuda \]; then \\\n.*install .* gcc libc6-dev python3-dev;', server)
