"""The README's commands and examples, word for word but for the port, against a server that was started as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT

README_URL = "http://127.0.0.1:8000"
READY_SECONDS = 60
EXAMPLE_SECONDS = 60

TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"```bash\n(make .*?)\n```", TEXT)
CURL, CHAT, STREAM, SAME_TEXT, LLM = re.findall(r"```(?:bash|python)\n(curl.*?|from.*?)```", TEXT, re.DOTALL)

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server of the default model listens: what `make serve` runs, on a free port."""
    program, *arguments = dry_run("serve", "ARGS=--port 0").splitlines()[-1].split()
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


def test_two_commands_are_all() -> None:
    assert COMMANDS == ["make serve", "make test"]
    assert dry_run("test").splitlines()[-1].endswith("python -m pytest")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(url: str) -> None:
    answer = run("sh", "-c", example=CURL, url=url)
    assert re.search(r'"message":\{"role":"assistant","content":"[^"]', answer)
    assert '"timings":{' in answer


def test_chat(url: str) -> None:
    *text, timings = run(sys.executable, "-c", example=CHAT, url=url).splitlines()
    assert len("".join(text)) > 20
    for name in ("queue_ms", "ttft_ms", "tokens_per_second", "drafter", "drafted_tokens", "accepted_tokens"):
        assert f"'{name}'" in timings
        assert name in CHAT  # as its comment says


def test_stream(url: str) -> None:
    assert len(run(sys.executable, "-c", example=STREAM, url=url)) > 50


def test_same_text(url: str) -> None:
    drafted, same = run(sys.executable, "-c", example=SAME_TEXT, url=url).splitlines()
    assert same == "the same text: True"
    assert re.fullmatch(r"\d+ tokens came out of drafts", drafted)


def test_without_a_server() -> None:
    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    (prompt,) = re.findall(r"\[\[([\d, ]+)\]\]", LLM)
    (text,) = re.findall(r'what follows "(.*)"', LLM)
    assert tokenizer.encode(text) == [int(id_) for id_ in prompt.split(",")]
    ids = run(sys.executable, "-c", example=LLM)
    assert "Paris" in tokenizer.decode([int(id_) for id_ in ids.strip("[]\n").split(",")])
