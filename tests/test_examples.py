"""The programs in examples/, run as a user runs them, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.running_server import RunningServer

FOLDER = ROOT / "examples"

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("examples")]  # one server


@pytest.fixture(scope="module")
def example_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("examples") / "log"
    running = RunningServer(log, "--model", str(tiny_llama), "--kv-cache-memory", "16MiB")
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


def run(name: str, *arguments: str, url: str = "") -> str:
    """What the program prints; it must end with status 0."""
    urls = {"OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url} if url else {}
    environment = {**os.environ, **urls}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat(example_server: RunningServer) -> None:
    assert re.search(r"^\d+ tokens, the first after \d+ ms$", run("chat", url=example_server.url), re.MULTILINE)


def test_streaming(example_server: RunningServer) -> None:
    printed = run("streaming", url=example_server.url)
    assert re.search(r"^\d+ tokens, \d+ of them drafted$", printed, re.MULTILINE)


def test_same_text(example_server: RunningServer) -> None:
    printed = run("same_text", url=example_server.url)
    assert re.findall(r"^(\w+): the same text$", printed, re.MULTILINE) == ["auto", "ngram", "suffix"]
    assert "'clairvoyance', but this server knows 'auto', 'off', 'ngram'" in printed


def test_prediction(example_server: RunningServer) -> None:
    printed = run("prediction", url=example_server.url)
    assert re.search(r"^\d+ predicted tokens accepted, \d+ rejected$", printed, re.MULTILINE)


def test_responses(example_server: RunningServer) -> None:
    printed = run("responses", url=example_server.url)
    assert re.search(r"^\d+ tokens in, \d+ of them cached$", printed, re.MULTILINE)


def test_structured_output(example_server: RunningServer) -> None:
    person, train = run("structured_output", url=example_server.url).splitlines()
    assert re.fullmatch(r"name='.*' age=\d+ mood='(happy|sad|hungry)'", person)
    assert re.fullmatch(r"At ([01]\d|2[0-3]):[0-5]\d\.", train)


def test_tools(example_server: RunningServer) -> None:
    assert re.match(r'weather\(\{"city": ".*"\}\)\n.', run("tools", url=example_server.url))


def test_messages(example_server: RunningServer) -> None:
    printed = run("messages", url=example_server.url)
    assert re.search(r"^\d+ tokens to read$", printed, re.MULTILINE)
    assert re.search(r"^\d+ tokens, ended by (max_tokens|end_turn|stop_sequence)$", printed, re.MULTILINE)


def test_offline(tiny_llama: Path) -> None:
    lines = run("offline", str(tiny_llama)).splitlines()
    assert len(lines) == 4
    assert all("->" in line for line in lines)


def test_asynchronous(tiny_llama: Path) -> None:
    *answers, read = run("asynchronous", str(tiny_llama)).splitlines()
    assert len(answers) == 3
    assert all("->" in line for line in answers)
    assert read == "read 5 tokens"


def test_compare_drafters(tiny_llama: Path) -> None:
    *arms, verdict = run("compare_drafters", str(tiny_llama)).splitlines()
    assert [arm.split()[0] for arm in arms] == ["off", "ngram", "suffix", "auto"]
    assert verdict == "the same text with each: True"


def test_every_program_is_listed_and_tested() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py")}
    listed = set(re.findall(r"\[(\w+)\.py\]\(\1\.py\)", (FOLDER / "README.md").read_text()))
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert programs == listed
    assert programs <= tested
