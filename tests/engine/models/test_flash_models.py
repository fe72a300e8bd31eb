"""Whole models over flash-attn's stand-ins: transformers' logits, the same text with and without drafts, settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError, ModelError
from tests.support.pairwise import pairwise
from tests.support.parity import KernelsName, in_pieces, logits_of, runner_of
from tests.support.tiny import KINDS, build_model, make_tiny

Tiny = Callable[[str], Path]
PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2

CHUNKED, DECODED = (7, 8, 24, 25, 40), tuple(range(30, 41))
GPUS = {"flash2": (8, 0), "flash4": (9, 0)}


@cache
def references(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits in float32 and in bfloat16."""
    exact = logits_of(build_model(kind), PROMPT)
    return exact, logits_of(build_model(kind).bfloat16(), PROMPT).float()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend", "ends"), pairwise(KINDS, ("torch", *GPUS), (CHUNKED, DECODED)))
def test_logits_equal_transformers_in_bfloat16(
    tiny: Tiny, flash_attn, kind: str, backend: str, ends: tuple[int, ...]
) -> None:
    """Every backend is as near to the float32 model as transformers' own bfloat16 is, or nearly so."""
    flash = flash_attn(GPUS.get(backend, (9, 0)))
    exact, theirs = references(kind)
    bound = 1.5 * (theirs - exact).square().mean().sqrt()
    assert bound < 0.05 * exact.std()
    runner = runner_of(str(tiny(kind)), "torch", dtype="bfloat16", attention_backend=backend)
    found = in_pieces(runner, PROMPT, ends).float()
    assert (found - exact).square().mean().sqrt() <= bound
    assert bool(flash.calls) == (backend != "torch")


PROMPTS = [PROMPT, PROMPT[::-1] + PROMPT, [5, 6, 7, 8] * 12, PROMPT[:3]]


def texts(model: Path, **settings) -> list[list[int]]:
    params = [
        SamplingParams(max_tokens=16, temperature=t, seed=s, ignore_eos=True) for s, t in enumerate((0.0, 0.8) * 2)
    ]
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "device": "cpu",
        "kv_cache_memory": 1 << 24,
        "adaptive_drafts": False,
        "num_threads": 1,
    }
    with LLM(model=str(model), **(defaults | settings)) as llm:
        return [list(output.token_ids) for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("backend", GPUS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_drafts_do_not_change_the_text(tiny: Tiny, flash_attn, kind: str, backend: str) -> None:
    """The engine as it is, over mixed spans of prefill, verification and decoding; the stand-in's rows are exact."""
    flash = flash_attn(GPUS[backend])
    plain = texts(tiny(kind), speculation="none")
    drafted = texts(tiny(kind), speculation="ngram")
    assert drafted == plain
    assert flash.calls


def test_a_draft_model_over_flash_attn(tiny: Tiny, flash_attn) -> None:
    flash_attn((8, 0))
    target, draft = tiny("llama"), str(tiny("llama-tied"))
    settings = {"speculation": "draft-model", "drafter": (f"draft-model={draft}",)}
    assert texts(target, **settings) == texts(target, speculation="none")


def platform_of(model: Path, **settings):
    config = EngineConfig(model=str(model), device="cpu", **({"dtype": "bfloat16"} | settings))
    return load_model(config.model, None, config, 0, lambda what, share: None)[1]


@pytest.mark.parametrize(
    ("capability", "settings", "backend", "block_size"),
    [
        ((9, 0), {}, "flash4", 128),
        ((9, 0), {"block_size": 16}, "flash4", 16),
        ((8, 0), {}, "flash2", 256),
        ((8, 0), {"block_size": 512}, "flash2", 512),
        ((8, 0), {"block_size": 32}, "triton", 32),
        ((8, 0), {"attention_backend": "triton"}, "triton", 64),
        ((9, 0), {"attention_backend": "flash2"}, "flash2", 256),
        ((9, 0), {"attention_backend": "torch"}, "torch", 16),
        ((10, 0), {"kv_cache_dtype": "fp8"}, "flash4", 128),
        ((9, 0), {"kv_cache_dtype": "fp8"}, "triton", 64),
        ((8, 0), {"kv_cache_dtype": "fp8", "attention_backend": "torch"}, "torch", 16),
    ],
)
def test_backend_and_block_size(tiny: Tiny, flash_attn, capability, settings, backend, block_size) -> None:
    flash_attn(capability)
    platform = platform_of(tiny("llama"), **settings)
    assert (platform.attention.name, platform.block_size) == (backend, block_size)
    assert platform.kernels_name == ("torch" if backend == "torch" else f"torch+{backend}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_backend": "flash2", "block_size": 16}, "multiple of 256, not 16"),
        (
            {"attention_backend": "flash2", "kv_cache_dtype": "fp8"},
            "must be in the model's dtype, bfloat16, not in fp8",
        ),
        ({"attention_backend": "flash4", "kv_cache_dtype": "fp8"}, r"on compute capability 10.x \(B200\) only"),
        ({"attention_backend": "native"}, "float32 on the CPU"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Tiny, flash_attn, settings, message) -> None:
    flash_attn((9, 0))
    with pytest.raises(ConfigError, match=f"attention_backend is '{settings['attention_backend']}', but .*{message}"):
        platform_of(tiny("llama"), **settings)


def test_without_a_gpu_flash_attn_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend is 'flash4', but .* NVIDIA GPUs, not on cpu"):
        platform_of(tiny("llama"), attention_backend="flash4")


def test_native_and_torch_can_be_mixed(tiny: Tiny) -> None:
    """Matrices by one, attention by the other: the same logits, and a name that says so."""
    exact = logits_of(build_model("qwen3"), PROMPT)
    mixes: list[tuple[KernelsName, str]] = [("native", "torch"), ("torch", "native")]
    for kernels, attention in mixes:
        settings = {"dtype": "float32", "kernels": kernels, "attention_backend": attention}
        assert platform_of(tiny("qwen3"), **settings).kernels_name == f"{kernels}+{attention}"
        found = in_pieces(runner_of(str(tiny("qwen3")), kernels, attention_backend=attention), PROMPT, CHUNKED)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_a_draft_that_the_backend_cannot_compute_is_refused(tmp_path: Path, tiny: Tiny, flash_attn) -> None:
    flash_attn((10, 0))
    wide = make_tiny("qwen3", tmp_path / "wide", head_dim=160)
    with pytest.raises(ConfigError, match=r"drafter .*wide.*: .* head_dim of 8 to 128, or 256, .* is 160"):
        LLM(model=str(tiny("llama")), drafter=(str(wide),), dtype="bfloat16", device="cpu")


def dummy_of(tiny: Tiny, kind: str, target: Path) -> Path:
    """A folder with nothing but a config.json."""
    target.mkdir()
    shutil.copy(tiny(kind) / "config.json", target)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_dummy_weights_need_no_files_but_the_configuration(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    folder = dummy_of(tiny, kind, tmp_path / "dummy")
    logits = in_pieces(runner_of(str(folder), "torch", load_format="dummy"), PROMPT, (7, 40))
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100
    again = in_pieces(runner_of(str(folder), "torch", load_format="dummy"), PROMPT, (7, 40))
    assert torch.equal(logits, again)


def test_dummy_weights_in_the_engine(tiny: Tiny, tmp_path: Path) -> None:
    folder = dummy_of(tiny, "llama", tmp_path / "dummy")
    with pytest.raises(ModelError, match=r"neither model.safetensors nor"):
        texts(folder)
    for settings in ({}, {"quantization": "fp8"}, {"dtype": "float32"}):
        assert all(len(text) == 16 for text in texts(folder, load_format="dummy", **settings))
