"""The engine's model against transformers': the same logits for every kind of model, on every set of kernels.

Float32 sums in another order differ by some units in the last place, which the layers carry on: of the tiny models'
logits (up to 18) the largest difference is about 4e-5, of SmolLM2's (up to 40, 30 layers) 1.4e-4, as much as
transformers' own float32 differs from its float64. A wrong scaling, bias or position gives units.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.execution.batch import Span
from tests.support.native import BOTH
from tests.support.pairwise import pairwise
from tests.support.parity import BLOCKS, OTHERS, KernelsName, in_pieces, logits_of, runner_of
from tests.support.tiny import KINDS, build_model

Tiny = Callable[[str], Path]

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2  # 40 tokens


WHOLE, CHUNKED, DECODED = (40,), (7, 8, 24, 25, 40), tuple(range(30, 41))


@pytest.mark.parametrize(
    ("kernels", "kind", "ends"),
    pairwise(
        BOTH,
        KINDS,
        [pytest.param(WHOLE, id="whole"), pytest.param(CHUNKED, id="chunked"), pytest.param(DECODED, id="decoded")],
    ),
    indirect=["kernels"],
)
def test_logits_equal_transformers(tiny: Tiny, kernels: KernelsName, kind: str, ends: tuple[int, ...]) -> None:
    found = in_pieces(runner_of(str(tiny(kind)), kernels), PROMPT, ends)
    assert found.shape == (40, 512)
    torch.testing.assert_close(found, logits_of(build_model(kind), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
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
