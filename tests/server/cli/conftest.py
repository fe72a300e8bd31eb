"""Fixtures of the command tests: quick settings, prompts and engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish.engine.llm import LLM
from tests.support.broken_verifier import GullibleVerifier

SENTENCES = (
    "the shark, the shark, the shark and the little fish that swims ahead of the shark",
    "for i in range(10): print(i) for i in range(10): print(i) for i in range(10):",
    "What is the capital of France? The capital of France is Paris. What is the capital",
    "one two three one two three one two three one two",
)


@pytest.fixture
def quick(tiny_llama: Path) -> list[str]:
    """Flags of a small engine that drafts whenever it can, so that runs are alike."""
    return [
        *("--model", str(tiny_llama), "--kernels", "torch", "--num-threads", "1", "--kv-cache-memory", "4MiB"),
        *("--no-adaptive-drafts", "--ignore-eos"),
    ]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Two files, one in each form of prompts."""
    first, second = tmp_path / "stories.jsonl", tmp_path / "questions.jsonl"
    first.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in SENTENCES[:2]))
    second.write_text("".join(json.dumps({"turns": [text, "And then?"]}) + "\n" for text in SENTENCES[2:]))
    return [str(first), str(second)]


@pytest.fixture
def make_llm(tiny: Callable[[str], Path]) -> Callable[..., LLM]:
    def make(**settings: object) -> LLM:
        quick: dict[str, Any] = {"num_threads": 1, "kv_cache_memory": 4 << 20}
        quick |= {"adaptive_drafts": False, "prefix_caching": False}
        return LLM(model=str(tiny("llama")), **{**quick, **settings})

    return make


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.engine.verification.choose.CoupledVerifier", GullibleVerifier)
