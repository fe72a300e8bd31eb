"""What the planner says of memory: sums, monotony, and what it proposes where something does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.memory.kv_cache import block_bytes
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.devices import DEVICES
from pilotfish.tools.planner.memory import fits, largest_batch, largest_context, plan_memory, remedies
from pilotfish.tools.planner.setup import Setup

SetupOf = Callable[..., Setup]


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_the_parts_add_up(setup_of: SetupOf, gpu: str, ranks: int) -> None:
    memory = plan_memory(setup_of(gpu, ranks))
    assert memory.fixed + memory.kv_cache + memory.unused == memory.total == DEVICES[gpu].memory
    assert min(memory.weights, memory.activations, memory.graphs, memory.reserved) > 0
    assert memory.kv_cache >= 0


def test_sizes_worked_out_by_hand(setup_of: SetupOf) -> None:
    memory = plan_memory(setup_of(ranks=4, kv_cache_memory=10 * 2**30))
    assert memory.weights == pytest.approx(2 * 70_553_706_496 / 4, rel=1e-4)
    assert memory.draft_weights == {"8b": 2 * 8_030_261_248, "1b": 2 * 1_235_814_400}
    assert memory.kv_bytes_per_token == 327_680 // 4 + 131_072 + 32_768
    assert memory.cached_tokens == 10 * 2**30 // memory.kv_bytes_per_token
    sharded = plan_memory(setup_of(ranks=4, draft_ranks=4))
    assert sharded.draft_weights["8b"] == pytest.approx(2 * 8_030_261_248 / 4, rel=1e-4)
    assert sharded.kv_bytes_per_token == (327_680 + 131_072 + 32_768) // 4


def test_the_cache_takes_most_of_a_gpu_and_little_of_a_host(setup_of: SetupOf) -> None:
    """Unless the settings say otherwise, on which the engine and the planner agree."""
    for name, share in (("h100", 0.9), ("cpu", 0.05)):
        settings = {"model": "smollm2-135m", "drafter": (), "kv_cache_share": 0.0, "enforce_eager": True}
        memory = plan_memory(setup_of(name, 1, **settings))
        free = memory.total - memory.reserved - memory.weights - (memory.activations if name == "h100" else 0)
        assert memory.kv_cache == int(share * free)
        assert EngineConfig().kv_cache_share == 0.0
        assert cache_share(0.0, on_gpu=name != "cpu") == share
    assert plan_memory(setup_of(kv_cache_share=0.5)).kv_cache < plan_memory(setup_of(kv_cache_share=0.0)).kv_cache


def test_an_fp8_cache_holds_twice_as_many_tokens(setup_of: SetupOf) -> None:
    plain, fp8 = (plan_memory(setup_of(kv_cache_dtype=dtype)) for dtype in ("auto", "fp8"))
    assert fp8.kv_bytes_per_token * 2 == plain.kv_bytes_per_token
    assert fp8.cached_tokens == pytest.approx(2 * plain.cached_tokens, abs=2)


@pytest.mark.parametrize(("form", "share"), [("bfloat16", 1 / 2), ("int8", (64 + 4) / (4 * 64))])
def test_a_cpus_cache_in_less_than_float32(setup_of: SetupOf, form: str, share: float) -> None:
    settings: dict[str, Any] = {"model": "smollm2-135m", "drafter": ()}
    plain, small = (
        plan_memory(setup_of("cpu", 1, **settings, kv_cache_dtype=dtype)).kv_bytes_per_token for dtype in ("auto", form)
    )
    assert small == share * plain
    shape = setup_of("cpu", 1, **settings).target.shape
    assert 16 * small == block_bytes(shape, 16, getattr(torch, form))


@pytest.mark.parametrize(("device", "change"), [("h100", {}), ("cpu", {"dtype": "bfloat16"})])
def test_a_cache_in_int8_is_for_models_in_float32_on_cpus(
    setup_of: SetupOf, device: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int8', which only the CPU's kernels read"):
        setup_of(device, 1, model="smollm2-135m", drafter=(), kv_cache_dtype="int8", **change)


def test_the_largest_context_and_batch_fill_the_cache(setup_of: SetupOf) -> None:
    setup = setup_of()
    memory = plan_memory(setup)
    context = largest_context(memory, setup)
    assert context * memory.kv_bytes_per_token <= memory.kv_cache < (context + 1) * memory.kv_bytes_per_token
    batch = largest_batch(memory, 4096)
    assert batch * 4096 <= memory.cached_tokens < (batch + 1) * 4096
    assert largest_context(memory, setup_of(max_model_len=1000)) == 1000


def test_70b_in_bfloat16_needs_more_than_one_h100_and_fp8_weights_help(setup_of: SetupOf) -> None:
    """141 GB of weights: two cards of 80 GB without drafts, not one; 71 GB in fp8 are on one card, barely."""
    alone = setup_of(ranks=1, drafter=())
    assert not fits(plan_memory(alone), alone)
    found = {remedy.what: remedy.ranks for remedy in remedies(alone)}
    assert found["as configured"] == 2
    assert found["fp8 weights"] == 1
    assert found["on h200"] == 1  # 150.8 GB
    assert found["on b200"] == 1
    assert "without draft models" not in found
    assert "without draft models" in {remedy.what for remedy in remedies(setup_of(ranks=1))}


def test_what_is_proposed_does_fit_and_fewer_gpus_do_not(setup_of: SetupOf) -> None:
    setup = setup_of("l40s", 1, model="meta-llama/Llama-3.1-405B-Instruct-FP8", drafter=())
    assert not fits(plan_memory(setup), setup)
    (as_configured,) = (remedy for remedy in remedies(setup) if remedy.what == "as configured")
    assert as_configured.ranks == 16
    for ranks, expected in ((8, False), (16, True)):
        room = setup.with_ranks(ranks)
        small = replace(room, settings=setup_of(kv_cache_memory=2**30, drafter=(), model=setup.settings.model).settings)
        assert fits(plan_memory(small), small) is expected


def test_a_cache_too_small_for_a_request_does_not_count_as_fitting(setup_of: SetupOf) -> None:
    setup = setup_of(kv_cache_memory=100 * 2**20)
    memory = plan_memory(setup)
    assert memory.unused > 0
    assert not fits(memory, setup)
    short = setup_of(kv_cache_memory=100 * 2**20, max_model_len=256)
    assert fits(plan_memory(short), short)


def test_fp8_weights_on_a_gpu_without_fp8_are_planned_in_16_bits(setup_of: SetupOf) -> None:
    model = "meta-llama/Llama-3.1-405B-Instruct-FP8"
    setup = setup_of("a100", 16, model=model, drafter=())
    assert setup.target.weight_bytes() == 2 * setup.target.params
    assert "does not compute with" in setup.notes[0]
    with pytest.raises(ConfigError, match="quantization is 'fp8', but a100 computes in bfloat16, float16, float32"):
        setup_of("a100", 16, model=model, quantization="fp8")


@pytest.mark.parametrize(("name", "bits"), [("int8", (8.5, 8.5)), ("int4", (5.0, 8.5))])
def test_weights_quantized_on_a_cpu(setup_of: SetupOf, name: str, bits: tuple[float, float]) -> None:
    setup = setup_of("cpu", 1, model="smollm2-135m", quantization=name, drafter=())
    layers, vocabulary = 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536), 49152 * 576
    norms = 61 * 576 * 4
    assert setup.target.weight_bytes() == (layers * bits[0] + vocabulary * bits[1]) / 8 + norms
    assert sum(matrix.bytes for matrix in setup.target.matrices()) == setup.target.weight_bytes() - norms
    with pytest.raises(
        ConfigError, match=f"quantization is '{name}', which is for CPUs and float32: not bfloat16 on h100"
    ):
        setup_of("h100", 4, quantization=name)


def test_quantization_none_takes_an_fp8_checkpoint_in_16_bits(setup_of: SetupOf) -> None:
    model = "meta-llama/Llama-3.1-405B-Instruct-FP8"
    plain = setup_of("h100", 16, model=model, quantization="none", drafter=())
    assert plain.target.weight_bytes() == 2 * plain.target.params
    auto = setup_of("h100", 16, model=model, drafter=())
    assert auto.target.weight_bytes() < 0.7 * plain.target.weight_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 3}, r"num_heads \(64\) does not divide by 3 .*: use 1, 2, 4, 8 or 16"),
        ({"ranks": 4, "draft_ranks": 2}, "draft_tensor_parallel_size is 2, but must be 1 or tensor_parallel_size"),
        (
            {"drafter": ("smollm2-135m",)},
            "drafter 'smollm2-135m' has a vocabulary of 49152 tokens, the target of 128256",
        ),
        ({"max_model_len": 200_000}, "max_model_len is 200000, but the model's context is 131072"),
        ({"gpu": "cpu", "ranks": 2}, "cpu has no link to others: use 1"),
        ({"gpu": "cpu", "ranks": 1, "dtype": "bfloat16"}, "dtype is 'bfloat16', but cpu computes in float32"),
        ({"gpu": "h1000"}, "did you mean 'h100'"),
    ],
)
def test_what_cannot_work_is_refused(setup_of: SetupOf, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup_of(**changes)
