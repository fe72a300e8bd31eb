"""What keeps a server that was broken into from doing more: the service's and the manifest's hardening stays."""

from __future__ import annotations

import configparser
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

ON = {
    *("ProtectHome", "PrivateTmp", "NoNewPrivileges", "ProtectKernelTunables", "ProtectKernelModules"),
    *("ProtectKernelLogs", "ProtectControlGroups", "ProtectHostname", "RestrictNamespaces", "RestrictRealtime"),
    *("RestrictSUIDSGID", "LockPersonality", "DynamicUser"),
}
SET = {
    "ProtectSystem": "strict",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
}


def test_the_systemd_service_is_confined() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names as they stand there
    parser.read(ROOT / "docker/systemd/pilotfish.service")
    service = dict(parser["Service"])
    assert {name for name in ON if service.get(name) != "yes"} == set()
    assert {name: service.get(name) for name in SET} == SET
    assert "LoadCredential" in service, "keys are not in the environment"


def pods() -> list[tuple[str, dict[str, Any]]]:
    """The specifications of all pods in the manifests, by kind and name."""
    found = []
    for path in sorted((ROOT / "docker/kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            spec = (document or {}).get("spec") or {}
            for template in (spec.get("template"), *(spec.get("leaderWorkerTemplate") or {}).values()):
                if isinstance(template, dict) and "containers" in (pod := template.get("spec") or {}):
                    found.append((f"{document['kind']} {document['metadata']['name']}", pod))
    return found


def test_there_are_pods() -> None:
    assert any(name.startswith("Deployment") for name, _ in pods())


@pytest.mark.parametrize(("name", "pod"), [pytest.param(*each, id=each[0]) for each in pods()])
def test_pods_are_confined(name: str, pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
