"""A real server that the HTTP tests share, and OpenAI's client on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.running_server import RunningServer


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = RunningServer(log, "--model", str(tiny_llama), "--kv-cache-memory", "16MiB", "--max-num-seqs", "16")
    try:
        running.wait_for("/ready", 200)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(ModelFiles("tiny", "huggingface", tiny_llama))
