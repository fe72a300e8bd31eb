"""Weights in fp8: the arithmetic, published checkpoints' layouts, quantization at loading, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.kernels.fp8 import Fp8Linear, fp8_linear, prepare_fp8
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.errors import ConfigError, ModelError
from tests.support.fp8_checkpoints import LAYOUTS, compressed, publish
from tests.support.parity import BLOCKS, KernelsName, in_pieces, runner_of
from tests.support.tiny import KINDS

Tiny = Callable[[str], Path]
PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5), size=st.sampled_from([1, 16, 48]), seed=st.integers(0, 99), exponent=st.floats(-30.0, 30.0)
)
def test_rows_are_rounded_to_three_bits_behind_the_leading_one(rows, size, seed, exponent):
    """Each number to within 1/16 of itself, or of the least that its row's scale can tell apart."""
    x = random(rows, size, seed=seed) * 10.0**exponent
    quantized, scale = quantize(x)
    assert (quantized.dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.float32, (rows, 1))
    error = (quantized.float() * scale - x).abs()
    assert (error <= x.abs() / 16 * (1 + 1e-5) + scale * 2.0**-10).all()
    if x.abs().amax(1).min() > 1e-9:
        assert (quantized.float().abs().amax(1) == 448).all()


def test_rows_of_zeros_stay_zeros():
    quantized, scale = quantize(torch.zeros(2, 16))
    assert torch.equal(quantized.float() * scale, torch.zeros(2, 16))


def prepared(columns: int, inner: int, bias: bool = False) -> Fp8Linear:
    weight, scale = quantize(random(columns, inner, seed=1))
    return prepare_fp8(weight, random(columns, seed=2) if bias else None, scale)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 16, 16), (7, 64, 48), (40, 256, 128)])
def test_reference_equals_torchs_scaled_mm(rows, inner, columns):
    """The very call that CUDA gets, as torch computes it on the CPU: bfloat16 of the same numbers."""
    x, weight = random(rows, inner), prepared(columns, inner)
    quantized, scale = quantize(x)
    wanted = torch._scaled_mm(
        quantized, weight.weight.t(), scale_a=scale, scale_b=weight.scale, out_dtype=torch.bfloat16
    )
    torch.testing.assert_close(fp8_linear(x, weight), wanted.float(), rtol=2**-8, atol=1e-4)


def test_product_is_close_to_the_plain_one_and_rows_do_not_know_of_each_other():
    x, full = random(9, 256), random(64, 256, seed=1)
    weight = prepared(64, 256, bias=True)
    y = fp8_linear(x, weight)
    # 256 products, each off by some 3 %, at random: 3 % of their sum's standard deviation, 16.
    assert (y - (x @ full.T + random(64, seed=2))).abs().max() < 3.0
    for row in range(9):
        torch.testing.assert_close(fp8_linear(x[row : row + 1], weight)[0], y[row])


def test_sizes_that_cuda_cannot_take_are_refused():
    weight, scale = quantize(random(24, 64))
    with pytest.raises(ValueError, match="multiples of 16, and the weight's are 24 by 64"):
        prepare_fp8(weight, None, scale)


def logits(model: Path, kernels: KernelsName = "torch", **settings) -> torch.Tensor:
    return in_pieces(runner_of(str(model), kernels, **settings), PROMPT, (7, 8, 20))


def dense(layer: DecoderLayer) -> DenseMlp:
    assert isinstance(layer.mlp, DenseMlp)
    return layer.mlp


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(tiny: Tiny, tmp_path: Path, layout: str) -> None:
    fp8, plain = publish(tiny("llama"), tmp_path, layout)
    # On the CPU "auto" makes plain weights of them: the very same model.
    torch.testing.assert_close(logits(fp8), logits(plain), rtol=0, atol=1e-4)
    # In fp8 activations are rounded, too, but weights are not rounded again.
    found, wanted = logits(fp8, quantization="fp8"), logits(plain)
    assert not torch.allclose(found, wanted, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.97
    runner = runner_of(str(fp8), "torch", quantization="fp8")
    kinds = [type(dense(layer).gate_up) is Fp8Linear for layer in runner.model.decoder.layers]
    assert kinds == ([True, True] if layout == "auto-fp8" else [False, True])
    assert all(type(layer.qkv) is Fp8Linear for layer in runner.model.decoder.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_at_loading(tiny: Tiny, kind: str) -> None:
    found, wanted = logits(tiny(kind), quantization="fp8"), logits(tiny(kind))
    assert not torch.allclose(found, wanted, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, wanted).mean() > 0.97


def test_quantization_at_loading_is_the_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    """Scales for each output channel, found here or by who made the checkpoint: the same numbers."""
    fp8, _ = publish(tiny("llama"), tmp_path, "fbgemm_fp8")
    again = runner_of(str(tiny("llama")), "torch", quantization="fp8").model.decoder.layers
    for mine, theirs in zip(again, runner_of(str(fp8), "torch", quantization="fp8").model.decoder.layers, strict=True):
        for one, other in ((mine.qkv, theirs.qkv), (dense(mine).down, dense(theirs).down)):
            assert isinstance(one, Fp8Linear)
            assert isinstance(other, Fp8Linear)
            assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
            assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "blocks of a matrix"),
        (compressed("group"), "8-bit float by group"),
        ({"quant_method": "gptq"}, "'gptq'"),
    ],
)
def test_other_schemes_are_refused(tiny: Tiny, tmp_path: Path, config: dict, message: str) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    with pytest.raises(ModelError, match=message):
        read_hf_config(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_proj.weight_scale", None, "has no weight_scale"),
        (
            "q_proj.weight_scale",
            torch.ones(3),
            r"shape \(3,\), but must have a scale for each",
        ),
        ("q_proj.weight", torch.ones(64, 64), "has a weight_scale, which only fp8"),
        ("q_proj.zeros", torch.ones(1), "has tensor 'model.layers.1.self_attn.q_proj.zeros'"),
    ],
)
def test_broken_checkpoints_are_refused(tiny: Tiny, tmp_path: Path, name: str, change, message: str) -> None:
    fp8, _ = publish(tiny("llama"), tmp_path, "fbgemm_fp8")
    tensors, name = load_file(fp8 / "model.safetensors"), f"model.layers.1.self_attn.{name}"
    tensors.pop(name, None)
    save_file(tensors | ({} if change is None else {name: change}), fp8 / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        logits(fp8)


def test_a_half_quantized_group_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Query, key and value are one matrix here, in one dtype."""
    fp8, plain = publish(tiny("llama"), tmp_path, "fbgemm_fp8")
    tensors, name = load_file(fp8 / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    del tensors[name + "_scale"]
    tensors[name] = load_file(plain / "model.safetensors")[name]
    save_file(tensors, fp8 / "model.safetensors")
    raw = json.loads((fp8 / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"].append(name.removesuffix(".weight"))
    (fp8 / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="qkv_proj"):
        logits(fp8, quantization="fp8")
    torch.testing.assert_close(logits(fp8), logits(plain), rtol=0, atol=1e-4)  # as plain weights it can be read


@pytest.mark.parametrize(
    ("setting", "capability", "fp8"),
    [("auto", (9, 0), True), ("auto", (8, 9), True), ("auto", (8, 0), False), ("none", (9, 0), False)],
)
def test_auto_is_fp8_where_the_gpu_can(tiny: Tiny, tmp_path: Path, flash_attn, setting, capability, fp8) -> None:
    flash_attn(capability)
    folder, _ = publish(tiny("llama"), tmp_path, "fbgemm_fp8")
    model = runner_of(str(folder), "torch", quantization=setting).model
    assert (type(dense(model.decoder.layers[1]).down) is Fp8Linear) == fp8


def test_old_gpus_and_the_native_kernels_are_refused(tiny: Tiny, flash_attn) -> None:
    config = EngineConfig(model=str(tiny("llama")), quantization="fp8", device="cpu")
    with pytest.raises(ConfigError, match=r"kernels is 'native', but .* not with weights in fp8"):
        load(config, kernels="native")
    flash_attn((8, 0))
    with pytest.raises(ConfigError, match=r"needs compute capability 8.9 or newer, not 8.0"):
        load(config)


def load(config: EngineConfig, **changes):
    return load_model(config.model, None, replace(config, **changes), 0, lambda what, share: None)


def test_kv_cache_in_fp8(tiny: Tiny) -> None:
    runner = runner_of(str(tiny("llama")), "torch", kv_cache_dtype="fp8")
    found, wanted = in_pieces(runner, PROMPT, (7, 8, 20)), logits(tiny("llama"))
    assert torch.nn.functional.cosine_similarity(found, wanted).mean() > 0.97
    assert not torch.allclose(found, wanted, atol=1e-3)
    # The block written twice is the block written once: a rejected token's keys are overwritten here as well.
    runner.run([Span([8, 9, 10], 17, BLOCKS)])
    again = runner.run([Span(PROMPT[17:], 17, BLOCKS, 3)])
    torch.testing.assert_close(again, found[17:])
