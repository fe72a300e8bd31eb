"""The README's commands and examples, word for word but for the port, against a server that was started as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT

README_URL = "http://127.0.0.1:8000"
READY_SECONDS = 60
EXAMPLE_SECONDS = 60

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROGRAMS = [block for language, block in BLOCKS if language == "python"]


def block(language: str, *words: str) -> str:
    """The README's only example in that language that has all these words."""
    (found,) = (text for kind, text in BLOCKS if kind == language and all(word in text for word in words))
    return found


pytestmark = [pytest.mark.real_model, pytest.mark.process]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server of the default model listens: what `make serve` runs, on a free port, and with a seed: a sampled
    answer of a small model may be a word long."""
    program, *arguments = dry_run("serve", "ARGS=--port 0 --seed 1").splitlines()[-1].split()
    assert Path(program).name == "pilotfish"
    log = tmp_path_factory.mktemp("readme") / "log"
    with log.open("w") as output:
        # make's own virtual environment may be another one than this
        command = [str(Path(sys.executable).with_name("pilotfish")), *arguments]
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"^Ready in .*: (http://\S+)/v1", log.read_text(), re.MULTILINE)):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
        children = psutil.Process(server.pid).children()
        server.terminate()
        assert server.wait(15) == 0
        assert not any(child.is_running() for child in children)
    finally:
        if server.poll() is None:
            server.kill()


def dry_run(*arguments: str) -> str:
    """The commands that make would run, not told that it may be make that runs these tests."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def run(*command: str, example: str, url: str = "") -> str:
    """What an example prints."""
    if url:
        assert README_URL in example
        example = example.replace(README_URL, url)
    done = subprocess.run([*command, example], cwd=ROOT, capture_output=True, text=True, timeout=EXAMPLE_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def printed(program: str, url: str = "") -> str:
    """What a program of the README prints; each runs once, however many tests look at that."""
    return run(sys.executable, "-c", example=program, url=url)


def test_two_commands_are_all() -> None:
    commands = [text.strip() for kind, text in BLOCKS if kind == "bash" and text.startswith("make ")]
    assert commands == ["make serve", "make test"]
    assert " -m pytest" in dry_run("test").splitlines()[-1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(url: str) -> None:
    answer = run("sh", "-c", example=block("bash", "curl", "chat/completions"), url=url)
    assert re.search(r'"message":\{"role":"assistant","content":"[^"]', answer)
    assert '"timings":{' in answer


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_every_program_runs_and_prints_something(program: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("url") if README_URL in program else ""
    assert printed(program, url).strip()


def test_chat(url: str) -> None:
    example = block("python", "answer.timings")
    *text, timings = printed(example, url).splitlines()
    assert len("".join(text)) > 20
    for name in ("queue_ms", "ttft_ms", "tokens_per_second", "drafter", "drafted_tokens", "accepted_tokens"):
        assert f"'{name}'" in timings
        assert name in example  # as its comment says


def test_stream(url: str) -> None:
    assert len(printed(block("python", "stream=True"), url)) > 50


def test_same_text(url: str) -> None:
    drafted, same = printed(block("python", "the same text"), url).splitlines()
    assert same == "the same text: True"
    assert re.fullmatch(r"\d+ tokens came out of drafts", drafted)


def test_without_a_server() -> None:
    assert re.fullmatch(r" Paris[^\[]*\[(\d+, ){7}\d+\]\n", printed(block("python", "LLM(")))
