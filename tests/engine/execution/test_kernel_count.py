"""How many kernels a layer launches in a captured decode pass, counted on fake CUDA tensors. The planner's figures are
these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pilotfish.engine.execution.batch import FlatBatch, Span, pack
from pilotfish.engine.kernels import triton_products, triton_rows
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention import triton as triton_attention
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.flash import Flash2Attention, Flash4Attention
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.quantization import Quantization, quantized
from pilotfish.engine.weights.tensors import shape_of
from pilotfish.tools.planner import roofline
from tests.support.fake_cuda import CUDA
from tests.support.launches import Launches

triton = pytest.importorskip("pilotfish.engine.kernels.triton")
few = pytest.importorskip("pilotfish.engine.kernels.few")
pytestmark = pytest.mark.usefixtures("fake_cuda")

ROWS = ("add_norm_rows", "norm_heads", "rotate_heads", "gate_rows", "quantize_rows")
BACKENDS: dict[str, Callable[[Launches], AttentionBackend]] = {
    "triton": lambda launches: triton_attention.TritonAttention(132),
    # A context that is split is put together by a second kernel.
    "flash2": lambda launches: Flash2Attention(
        launches.attention("varlen", 1), launches.attention("with_kvcache, split", 2)
    ),
    "flash4": lambda launches: Flash4Attention(
        lambda *args, **kwargs: (launches.attention("varlen, split", 2)(*args), None), split=True
    ),
}


def launched(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, backend: str, fp8: bool, kernels: TorchKernels
) -> Counter[str]:
    """The launches of a captured pass over 4 sequences, one row each, up to the hidden states."""
    launches = Launches()
    monkeypatch.setattr(triton_products, "multiply_few", launches.triton("multiply_few"))
    for name in ROWS:
        monkeypatch.setattr(triton_rows, name, launches.triton(name))
    for name in ("attend_spans", "sum_parts"):
        monkeypatch.setattr(triton_attention, name, launches.triton(name))
    attention = BACKENDS[backend](launches)
    parts = Layout(config, 0, 1).parts().items()
    weights: Iterator[tuple[str, torch.Tensor]]
    weights = ((name, torch.empty(shape_of(part), dtype=torch.bfloat16)) for name, part in parts)
    if fp8:
        weights = quantized(weights, tensors_of(config), Quantization("fp8"), CUDA)
    size = attention.block_size
    with torch.no_grad():  # under inference_mode torch's compound operators would not be taken apart
        model = DecoderModel(config, kernels, attention, weights, 8192, CUDA)
        caches = kv_cache.allocate(config, attention, 8, size, torch.bfloat16, CUDA)
        arrays = pack([Span([1], 4, [0], 1)] * 4, size).to(CUDA).arrays
        tables = torch.zeros(4, 8192 // size, dtype=torch.int32, device=CUDA)
        batch = FlatBatch.bounded(arrays, tables, 1, 8192, size)
        with launches:
            model.forward(arrays.token_ids, arrays.positions, batch.attention, caches)
    return launches.count


def of_a_layer(monkeypatch, config: ModelConfig, backend: str, fp8: bool, kernels: TorchKernels) -> Counter[str]:
    few, more = (
        launched(monkeypatch, replace(config, num_layers=count, sliding_layers=()), backend, fp8, kernels)
        for count in (1, 2)
    )
    return more - few


@pytest.fixture(scope="session")
def shapes(tiny: Callable[[str], Path]) -> dict[str, ModelConfig]:
    return {kind: read_hf_config(tiny(kind)) for kind in ("llama", "qwen3", "gemma3")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "fp8", "most"),
    [("llama", False, 12), ("llama", True, 16), ("qwen3", False, 14), ("gemma3", False, 14), ("qwen3", True, 16)],
)
def test_a_layer_launches_few_kernels(monkeypatch, shapes, kind: str, fp8: bool, most: int, backend: str) -> None:
    count = of_a_layer(monkeypatch, shapes[kind], backend, fp8, triton.TritonKernels())
    assert sum(count.values()) <= most, count
    planned = roofline.KERNELS_PER_LAYER + roofline.LAYER_PRODUCTS * roofline.FP8_KERNELS * fp8
    # A window that is shorter than a split of the context needs no sum over parts.
    assert sum(count.values()) == planned - (kind == "gemma3" and backend == "triton"), count


@pytest.mark.parametrize("fp8", [False, True])
def test_products_with_few_rows_have_the_gate(monkeypatch, shapes, fp8: bool) -> None:
    """On Hopper."""
    assert roofline.FEW_ROWS == few.MOST_ROWS
    monkeypatch.setattr(few, "SMALLEST", 0)
    count = of_a_layer(monkeypatch, shapes["llama"], "triton", fp8, triton.TritonKernels(few=CUDA))
    assert count["multiply_few"] == roofline.LAYER_PRODUCTS
    assert not count["gate_rows"]
    assert sum(count.values()) == roofline.KERNELS_PER_LAYER - 1 + roofline.LAYER_PRODUCTS * fp8, count


def test_torchs_operators_launch_many(monkeypatch, shapes) -> None:
    """What the kernels replace is seen: each norm is taken apart here, which CUDA computes in one kernel."""
    count = of_a_layer(monkeypatch, shapes["llama"], "flash2", False, TorchKernels())
    assert sum(count.values()) >= 25, count
