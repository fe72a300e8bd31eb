"""The forward pass on a CUDA device that is not there: torch's fake tensors know shapes, dtypes and devices, but have
no numbers.

Every operator checks its arguments' devices, and CUDA's own rules where torch has written them down (torch._scaled_mm).
What would make the host wait for the device, .item(), .tolist(), a boolean mask as an index, cannot be had of a fake
tensor and fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.kernels.fp8 import fp8_linear, prepare_fp8
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.engine.weights.quantization import Quantization, quantized
from pilotfish.engine.weights.tensors import shape_of
from tests.support.fake_cuda import BACKENDS, CUDA
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS

pytestmark = pytest.mark.usefixtures("fake_cuda")


class Others:
    """The other ranks of a sharded model, as far as shapes and devices go."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, dim=1)


def weights_of(layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, part in layout.parts().items():
        yield name, torch.empty(shape_of(part), dtype=dtype)  # on the host, as files give them


def run(
    config: ModelConfig,
    backend: AttentionBackend,
    fp8: bool,
    cache_dtype: torch.dtype = torch.bfloat16,
    comm: Communicator = ALONE,
) -> None:
    weights = weights_of(Layout(config, comm.rank, comm.size), torch.bfloat16)
    if fp8:
        weights = quantized(weights, tensors_of(config), Quantization("fp8"), CUDA)
    with torch.inference_mode():
        model = DecoderModel(config, TorchKernels(), backend, weights, 256, CUDA, comm)
    size = backend.block_size
    caches = kv_cache.allocate(config, backend, 8, size, cache_dtype, CUDA, comm.size)
    runner = ModelRunner(model, caches, size, CUDA)
    blocks = list(range(8))
    spans = [Span([1] * 40, 0, blocks, 1), Span([1], 7, blocks, 1), Span([1] * 5, 30, blocks, 5), Span([1], 3, blocks)]
    for step in (spans, spans[1:2] * 3):
        logits = runner.run(step)
        assert isinstance(logits, FakeTensor)
        assert logits.device == CUDA
        assert logits.shape == (sum(span.logit_rows for span in step), config.vocab_size)


@pytest.fixture(scope="session")
def shapes(tiny: Callable[[str], Path]) -> dict[str, ModelConfig]:
    return {kind: read_hf_config(tiny(kind)) for kind in KINDS}


@pytest.mark.parametrize(("kind", "backend", "fp8"), pairwise(KINDS, BACKENDS, (False, True)))
def test_forward_stays_on_the_device_and_waits_for_nothing(shapes, kind, backend, fp8):
    run(shapes[kind], BACKENDS[backend](), fp8)


@pytest.mark.parametrize(("kind", "rank", "fp8"), pairwise(["llama", "llama-biased", "gemma3"], [0, 3], (False, True)))
def test_ranks_of_a_sharded_model_wait_for_nothing_either(shapes, kind, rank, fp8):
    """4 heads and 2 key-value heads (1 for gemma3) over 4 ranks, a vocabulary that leaves the last of them less."""
    run(replace(shapes[kind], vocab_size=510), TorchAttention(), fp8, comm=Others(rank, 4))


@pytest.mark.parametrize("backend", ["torch", "flash4"])
def test_forward_with_an_fp8_cache(shapes, backend):
    run(shapes["llama"], BACKENDS[backend](), False, torch.float8_e4m3fn)


def test_this_would_be_noticed(shapes):
    class Waits(TorchAttention):
        def attend(self, query, *rest):
            query[0, 0, 0].item()
            return super().attend(query, *rest)

    class Elsewhere(TorchAttention):
        def attend(self, query, *rest):
            return super().attend(query.cpu(), *rest)

    for broken in (Waits(), Elsewhere()):
        with pytest.raises(Exception, match=r"_local_scalar_dense|device"):
            run(shapes["llama"], broken, False)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 48), (5, 128, 16), (300, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scaled_mm_is_called_by_cudas_rules(rows, inner, columns, dtype):
    weight, scale = quantize(torch.empty(columns, inner, device=CUDA))
    prepared = prepare_fp8(weight, torch.empty(columns, dtype=dtype, device=CUDA), scale)
    y = fp8_linear(torch.empty(rows, inner, dtype=dtype, device=CUDA), prepared)
    assert (y.shape, y.dtype, y.device) == ((rows, columns), dtype, CUDA)


def test_cudas_rules_are_checked():
    weight = torch.empty(48, 64, device=CUDA).to(torch.float8_e4m3fn)
    x = torch.empty(5, 64, device=CUDA).to(torch.float8_e4m3fn)
    ones = torch.ones(5, 1, device=CUDA), torch.ones(1, 48, device=CUDA)
    with pytest.raises(RuntimeError, match="col"):
        torch._scaled_mm(x, weight.t().contiguous(), *ones, out_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="scal"):
        torch._scaled_mm(x, weight.t(), ones[0], ones[1].t(), out_dtype=torch.bfloat16)
