"""Kubernetes' manifests for routing and for replicas of several hosts: by the definitions of the custom resources where
there are any, and that they fit the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.docker.test_deployment import KUBERNETES, manifest
from tests.support.deployment import ROOT, documents

pytestmark = pytest.mark.docker

DEFINITIONS = os.environ.get("KUBERNETES_CRDS")
"""A folder with the CustomResourceDefinitions of Gateway, HTTPRoute, InferencePool and LeaderWorkerSet, from the
config/crd folders of gateway-api, gateway-api-inference-extension and lws, all of kubernetes-sigs on GitHub."""

KINDS = ("Gateway", "HTTPRoute", "InferencePool", "LeaderWorkerSet")


def strict(schema: Any) -> Any:
    """A definition's schema that allows no fields but its own."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    known = {name: strict(value) for name, value in schema.items()}
    if "properties" in known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        known.pop("type", None)
    return known


@pytest.mark.skipif(DEFINITIONS is None, reason="KUBERNETES_CRDS names no folder of definitions")
@pytest.mark.parametrize("kind", KINDS)
def test_custom_resources_are_as_their_definitions_have_them(kind: str) -> None:
    content = manifest(kind)
    definitions = [document for path in Path(str(DEFINITIONS)).glob("*.yaml") for document in documents(path)]
    (found,) = [each for each in definitions if each and each["spec"]["names"]["kind"] == kind]
    group, version = content["apiVersion"].split("/")
    assert group == found["spec"]["group"]
    (served,) = [each for each in found["spec"]["versions"] if each["name"] == version and each["served"]]
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):  # it does look at everything
        jsonschema.validate(content | {"spec": content["spec"] | {"unknown": 1}}, schema)


def test_the_pool_has_the_deployments_pods() -> None:
    pool, route = manifest("InferencePool"), manifest("HTTPRoute")
    pod = manifest("Deployment")["spec"]["template"]
    assert pool["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (port,) = pool["spec"]["targetPorts"]
    assert port["number"] == pod["spec"]["containers"][0]["ports"][0]["containerPort"]
    (rule,) = route["spec"]["rules"]
    ((backend,), (parent,)) = rule["backendRefs"], route["spec"]["parentRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    assert parent["name"] == manifest("Gateway")["metadata"]["name"]


def test_the_endpoint_picker_reads_metrics_that_there_are() -> None:
    (values,) = documents(KUBERNETES / "endpoint-picker-values.yaml")
    router, pool = values["router"], manifest("InferencePool")["spec"]
    assert router["modelServers"]["matchLabels"] == pool["selector"]["matchLabels"]
    assert router["modelServers"]["targetPorts"] == pool["targetPorts"]
    config = yaml.safe_load(router["epp"]["pluginsCustomConfig"][router["epp"]["pluginsConfigFile"]])
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    assert engine["name"] == plugins["core-metrics-extractor"]["defaultEngine"]
    documented = (ROOT / "docs" / "metrics.md").read_text()
    specs = [value for name, value in engine.items() if name.endswith("Spec")]
    assert len(specs) == 4
    for metric in specs:
        assert f"| `{metric}` |" in documented, metric
    (profile,) = config["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= set(plugins)


def test_only_the_leader_of_a_group_gets_requests() -> None:
    groups = manifest("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = groups["leaderTemplate"], groups["workerTemplate"]
    selector = manifest("Service")["spec"]["selector"]
    assert leader["metadata"]["labels"] == selector
    assert worker["metadata"]["labels"]["app.kubernetes.io/component"] != selector["app.kubernetes.io/component"]
    ((first,), (other,)) = leader["spec"]["containers"], worker["spec"]["containers"]
    assert {name: value for name, value in first.items() if name in other} == other
    assert set(first) - set(other) == {"startupProbe", "readinessProbe", "livenessProbe", "lifecycle"}
    deployed = manifest("Deployment")["spec"]["template"]["spec"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "securityContext"):
        assert first[name] == deployed["containers"][0][name]
    assert leader["spec"]["securityContext"] == deployed["securityContext"]
    gpus = first["resources"]["limits"]["nvidia.com/gpu"] * groups["size"]
    assert f"--tensor-parallel-size={gpus}" in first["args"]
