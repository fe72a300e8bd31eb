"""A head's drafts grown in one native call are those that are grown pass by pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.execution.runner import HeadRunner
from pilotfish.engine.kernels.native import NativeKernels, load_library
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.eagle3 import Eagle3Drafter
from tests.support.heads import head_config, head_weights

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native kernels were not built")

VOCAB, DRAFT_VOCAB, SIZE, GATED, BLOCK, LENGTH = 96, 48, 64, 96, 16, 200
CPU = torch.device("cpu")
WEIGHTS = ("float32", "int8", "own vocabulary", "residual before the norm")


@cache
def runner(kind: str) -> HeadRunner:
    draft_vocab = VOCAB if kind == "own vocabulary" else DRAFT_VOCAB
    config = head_config(draft_vocab, vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=GATED, head_dim=16)
    config = replace(config, norm_before_residual=kind == "residual before the norm")
    source = torch.Generator().manual_seed(0)
    weights = head_weights(config, source)
    if kind == "int8":
        for name, weight in list(weights.items()):
            if weight.ndim == 2:
                scale = weight.abs().amax(1, keepdim=True) / 127
                weights |= {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
    kernels = NativeKernels()
    attention = NativeAttention(kernels)
    embedding = kernels.prepare_linear(torch.randn(VOCAB, SIZE, generator=source))
    with torch.inference_mode():
        model = Eagle3Model(
            config, kernels, attention, weights, LENGTH + BLOCK, CPU, torch.float32, SharedWeights(embedding, embedding)
        )
        if kind != "own vocabulary":
            model.target_ids = torch.randperm(VOCAB, generator=source)[:DRAFT_VOCAB].sort().values
        cache = attention.allocate(200, BLOCK, 2, 16, torch.float32, CPU)
    return HeadRunner(model, cache, BLOCK, CPU)


@st.composite
def traffic(draw):
    """Sequences with their lengths, temperatures and seeds; and rounds: how far each goes on, and its request."""
    sequences = [
        (draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])), draw(st.integers(0, 99)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    request = st.tuples(st.integers(0, 5), st.integers(1, 6), st.sampled_from([0.0, 0.02, 0.2, 2.0]))
    rounds = draw(st.lists(st.lists(request, min_size=len(sequences), max_size=len(sequences)), min_size=1, max_size=3))
    return sequences, rounds, draw(st.integers(0, 999)), draw(st.sampled_from([25, LENGTH]))


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(max_examples=15)
@given(case=traffic())
def test_drafts_are_those_that_grow_pass_by_pass(kind, case):
    described, rounds, seed, budget = case
    heads = [
        Eagle3Drafter("head", runner(kind), (0, 1, 2), BlockPool(100, BLOCK, False), (0,), budget) for _ in range(2)
    ]
    whole, step_by_step = heads
    assert whole._whole is not None
    step_by_step._whole = None
    source = torch.Generator().manual_seed(seed)
    sequences = []
    for i, (length, temperature, own) in enumerate(described):
        params = SamplingParams(max_tokens=LENGTH, temperature=temperature)
        sequence = Sequence(
            Request(id=str(i), prompt_ids=(1,), params=params), own, BlockTable(BlockPool(1, BLOCK)), ("head",)
        )
        sequence.tokens[:] = torch.randint(VOCAB, (length,), generator=source).tolist()
        sequences.append(sequence)
    told = [0] * len(sequences)
    for asked, (i, sequence) in itertools.product(rounds, enumerate(sequences)):
        sequence.tokens += torch.randint(VOCAB, (asked[i][0],), generator=source).tolist()
    for asked in rounds:
        for i, sequence in enumerate(sequences):
            stop = min(len(sequence.tokens) - 1, told[i] + 8 + 8 * asked[i][0])
            features = FeatureRows(torch.randn(max(1, stop - told[i]), 3 * SIZE, generator=source), 0, stop - told[i])
            if stop > told[i]:
                for head in heads:
                    head.observe_features(sequence, told[i], features)
            told[i] = stop
        requests = [
            DraftRequest(sequence, limit, floor) for sequence, (_, limit, floor) in zip(sequences, asked, strict=True)
        ]
        with torch.inference_mode():
            (found, passes), (wanted, theirs) = ((head.propose(requests), head.passes) for head in heads)
        assert [draft.tokens for draft in found] == [draft.tokens for draft in wanted]
        assert passes == theirs
        for draft, other in zip(found, wanted, strict=True):
            assert draft.confidences == pytest.approx(other.confidences, abs=1e-5)


def test_other_kernels_grow_pass_by_pass():
    head = runner("float32")
    head.model.kernels, native = TorchKernels(), head.model.kernels
    try:
        assert head.whole_drafts() is None
    finally:
        head.model.kernels = native
