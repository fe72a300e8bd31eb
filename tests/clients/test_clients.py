"""Client libraries against a real server with SmolLM2, each in its own process: `make test-clients`.

The suites need libraries that the rest of Pilotfish does not. Those of Python are in `.venv-clients`, those of Node in
`tests/clients/node/node_modules`; the Makefile installs both.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running_server import RunningServer

pytestmark = [pytest.mark.clients, pytest.mark.process, pytest.mark.real_model]

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-clients" / "bin" / "python"
MODEL = "smollm2-135m"
SECONDS = 600


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path_factory.mktemp("clients") / "log", "--model", MODEL)
    server.wait_for("/health", 200)
    yield server
    server.stop()


@pytest.fixture(params=sorted(path.stem for path in (HERE / "python").glob("suite_*.py")))
def python_suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_python(served: RunningServer, python_suite: str) -> None:
    command = [PYTHON, "-m", "pytest", "-c", "pytest.ini", "--confcutdir=.", f"{python_suite}.py"]
    run(served, HERE / "python", *map(str, command))


@pytest.mark.parametrize("suite", sorted(path.name for path in (HERE / "node").glob("*.test.mjs")))
def test_node(served: RunningServer, suite: str) -> None:
    run(served, HERE / "node", "node", "--test", suite)


def run(server: RunningServer, folder: Path, *command: str) -> None:
    """Run a suite against the server; fail with what it printed."""
    drop = ("PYTHONPATH", "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL")
    variables = {name: value for name, value in os.environ.items() if name not in drop}
    variables |= {"PILOTFISH_URL": server.url, "PILOTFISH_MODEL": MODEL, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5000:]}"
