"""Fixtures that all tests share: models. What only one folder's tests need is in that folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, PreTrainedModel

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from tests.support.flash_attn_standin import modules
from tests.support.tiny import make_tiny

# How long an example takes says something about the machine and its other work, not about the code.
settings.register_profile("pilotfish", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pilotfish")

# The tests' tensors are small: more threads than one only wait for each other, all the more beside other tests.
torch.set_num_threads(1)


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


@dataclass(frozen=True, slots=True)
class FlashAttn:
    """flash-attn's stand-ins are importable, and what they were asked to do."""

    capability: tuple[int, int]
    calls: list[str]


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FlashAttn]:
    """`flash_attn(capability)`: from now on this machine's CPU passes for a GPU of that compute capability, with both
    flash-attn packages installed (tests/support/flash_attn_standin.py). Tensors stay on the CPU."""

    def install(capability: tuple[int, int] = (9, 0), without: tuple[str, ...] = ()) -> FlashAttn:
        calls: list[str] = []
        for name, module in modules(capability, calls).items():
            monkeypatch.setitem(sys.modules, name, None if name in without else module)
        monkeypatch.setattr("pilotfish.engine.execution.platform.compute_capability", lambda device: capability)
        return FlashAttn(capability, calls)

    return install
