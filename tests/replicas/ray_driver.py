"""A local Ray with docker/ray's application, for test_ray.py, in an environment that has Ray: `python ray_driver.py
PORT FOLDER` with docker/ray in PYTHONPATH. It takes commands as lines of JSON, and answers each with a line."""

from __future__ import annotations

import json
import sys
from typing import Any

import pilotfish_serve
import ray
from ray import serve

NAME = "pilotfish"


def states() -> dict[str, int]:
    """Numbers of replicas by their states."""
    (deployment,) = serve.status().applications[NAME].deployments.values()
    return {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}


def actors() -> list[str]:
    """Names of the replicas' actors that are alive."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if "SERVE_REPLICA" in each["name"]]


def do(command: dict[str, Any]) -> Any:
    match command["do"]:
        case "deploy":
            serve.run(pilotfish_serve.build(command["arguments"]), name=NAME, route_prefix="/")
            return states()
        case "states":
            return states()
        case "kill":
            name = actors()[0]
            ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
            return name
        case other:
            raise ValueError(other)


def main() -> None:
    port, folder = int(sys.argv[1]), sys.argv[2]
    ray.init(num_cpus=8, include_dashboard=False, _temp_dir=folder)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
