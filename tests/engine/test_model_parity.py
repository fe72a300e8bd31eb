"""The engine's model against transformers': the same logits for every kind of model, on every set of kernels.

Float32 sums in another order differ by some units in the last place, which the layers carry on: of the tiny models'
logits (up to 18) the largest difference is about 4e-5, of SmolLM2's (up to 40, 30 layers) 1.4e-4, as much as
transformers' own float32 differs from its float64. A wrong scaling, bias or position gives units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import KINDS, build_model
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.execution.loader import load_model
from engine.execution.runner import ModelRunner
from engine.execution.spans import Span
from engine.kernels.native import load_library
from engine.memory import kv_cache
from engine.weights.catalog import ModelFiles

Tiny = Callable[[str], Path]
KernelsName = Literal["native", "torch"]

BLOCK_SIZE = 16
BLOCKS = [5, 2, 7, 1]  # of 8: out of order, so that a row that goes to the wrong place is seen
OTHERS = [0, 6, 4, 3]
PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2  # 40 tokens


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> KernelsName:
    if request.param == "native" and load_library() is None:
        pytest.skip("the native kernels were not built here (no C compiler)")
    return request.param


def runner_of(model: str, kernels: KernelsName) -> ModelRunner:
    config = EngineConfig(model=model, dtype="float32", device="cpu", kernels=kernels)
    loaded, platform, _ = load_model(model, None, config, 0, lambda what, share: None)
    assert platform.kernels.name == kernels
    caches = kv_cache.allocate(
        loaded.config, platform.attention, len(BLOCKS) + len(OTHERS), BLOCK_SIZE, platform.dtype, platform.device
    )
    for cache in caches:  # what was never written shows if it is read
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    return ModelRunner(loaded, caches, BLOCK_SIZE, platform.device)


def in_pieces(runner: ModelRunner, tokens: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """Logits of all tokens, computed in spans that end at `ends`."""
    rows, start = [], 0
    for end in ends:
        rows.append(runner.run([Span(tokens[start:end], start, BLOCKS, end - start)]))
        start = end
    return torch.cat(rows)


@torch.inference_mode()
def logits_of(reference: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    logits = reference(torch.tensor([tokens])).logits[0]
    assert logits.std() > 1, "logits that are nearly flat would agree with anything"
    return logits


WHOLE, CHUNKED, DECODED = (40,), (7, 8, 24, 25, 40), tuple(range(30, 41))


@pytest.mark.parametrize("ends", [WHOLE, CHUNKED, DECODED], ids=["whole", "chunked", "decoded"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tiny: Tiny, kernels: KernelsName, kind: str, ends: tuple[int, ...]) -> None:
    found = in_pieces(runner_of(str(tiny(kind)), kernels), PROMPT, ends)
    assert found.shape == (40, 512)
    torch.testing.assert_close(found, logits_of(build_model(kind), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_spans_of_one_step_do_not_see_each_other(tiny: Tiny, kernels: KernelsName, kind: str) -> None:
    """A prefill chunk, a verification and a decode row side by side, twice, as the engine's steps are."""
    runner, reference = runner_of(str(tiny(kind)), kernels), build_model(kind)
    first, second = PROMPT, PROMPT[::-1]
    runner.run([Span(first[:20], 0, BLOCKS), Span(second[:9], 0, OTHERS)])
    found = runner.run([Span(second[9:12], 9, OTHERS, 3), Span(first[20:], 20, BLOCKS, 1)])
    wanted = torch.cat((logits_of(reference, second)[9:12], logits_of(reference, first)[39:]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_rejected_tokens_leave_no_trace(tiny: Tiny, kernels: KernelsName) -> None:
    """Rows past the accepted ones are overwritten by the next step."""
    runner = runner_of(str(tiny("qwen3")), kernels)
    runner.run([Span(PROMPT[:30], 0, BLOCKS), Span(PROMPT[:1], 0, OTHERS)])
    runner.run([Span([8, 9, 10, 11, 12, 13], 30, BLOCKS, 6)])
    found = runner.run([Span(PROMPT[30:], 30, BLOCKS, 10)])
    torch.testing.assert_close(found, logits_of(build_model("qwen3"), PROMPT)[30:], rtol=0, atol=1e-4)


@pytest.mark.real_model
def test_smollm2s_logits_equal_transformers(
    smollm2: ModelFiles, smollm2_reference: PreTrainedModel, kernels: KernelsName
) -> None:
    tokens = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
        2,
    ]
    tokens = tokens * 2
    wanted = logits_of(smollm2_reference, tokens)
    runner = runner_of(smollm2.name, kernels)
    for ends in (WHOLE, CHUNKED):
        torch.testing.assert_close(in_pieces(runner, tokens, ends), wanted, rtol=0, atol=5e-4)
