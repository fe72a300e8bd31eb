"""Fixtures that all tests share: models. What only one folder's tests need is in that folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.weights.catalog import ModelFiles, resolve


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(kind)`: the folder of a small random model (see tiny.KINDS), made once in a test run. Not to be changed."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(kind, tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny: Callable[[str], Path]) -> Path:
    """A small random model like Llama 3.1 with a tokenizer and chat template: what most tests of the server run on."""
    return tiny("llama")


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The real SmolLM2-135M-Instruct. Tests that use it are marked real_model."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: ModelFiles) -> PreTrainedModel:
    """The same model as transformers itself reads and computes it, in float32. Takes 10 to 20 s. Not to be changed."""
    folder, name = smollm2.path.parent, smollm2.path.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
