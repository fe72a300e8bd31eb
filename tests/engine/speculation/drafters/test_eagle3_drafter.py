"""What an EAGLE-3 head is told of a sequence, in whatever pieces, is what it drafts from."""

from __future__ import annotations

import random

import pytest
import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.runner import HeadRunner
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.eagle3 import Eagle3Drafter
from pilotfish.engine.speculation.drafters.feature_backlog import MOST_PENDING
from tests.support.heads import head_config, head_weights

VOCAB, DRAFT_VOCAB, SIZE, BLOCK, LENGTH = 96, 32, 32, 16, 600
LAYERS = (0, 1, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runner() -> HeadRunner:
    config = head_config(DRAFT_VOCAB, vocab_size=VOCAB, hidden_size=SIZE)
    source = torch.Generator().manual_seed(0)
    weights = head_weights(config, source)
    kernels, attention = TorchKernels(), TorchAttention()
    embedding = kernels.prepare_linear(torch.randn(VOCAB, SIZE, generator=source))
    shared = SharedWeights(embedding, embedding)
    model = Eagle3Model(config, kernels, attention, weights, LENGTH + BLOCK, CPU, torch.float32, shared)
    model.target_ids = torch.arange(0, VOCAB, 3)
    cache = attention.allocate(4 * LENGTH // BLOCK, BLOCK, 2, 8, torch.float32, CPU)
    return HeadRunner(model, cache, BLOCK, CPU)


def draft(head: Eagle3Drafter, tokens: list[int]) -> Draft:
    """Asked until it has read everything."""
    request = Request(id="x", prompt_ids=(1,), params=SamplingParams(max_tokens=LENGTH, temperature=0.0))
    sequence = Sequence(request, 0, BlockTable(BlockPool(1, BLOCK)), ("head",))
    sequence.tokens[:] = tokens
    while True:
        backlog = head.backlog(sequence)
        with torch.inference_mode():
            (found,) = head.propose([DraftRequest(sequence, 4)])
        if found.tokens:
            return found
        assert 0 < head.backlog(sequence) < backlog


def tell(head: Eagle3Drafter, start: int, stop: int, features: torch.Tensor, spare: int = 0) -> None:
    """Of a pass that has `spare` rows before."""
    request = Request(id="x", prompt_ids=(1,), params=SamplingParams(max_tokens=LENGTH))
    sequence = Sequence(request, 0, BlockTable(BlockPool(1, BLOCK)), ("head",))
    rows = torch.cat([torch.full((spare, 3 * SIZE), torch.nan), features[start:stop]])
    head.observe_features(sequence, start, FeatureRows(rows, spare, spare + stop - start))


@pytest.mark.parametrize("seed", range(12))
def test_the_pieces_do_not_matter(runner: HeadRunner, seed: int) -> None:
    """Pieces of any size, some of them twice; now and then a draft in between, which reads what is there, a few rows a
    pass."""
    source = random.Random(seed)
    features = torch.randn(LENGTH, 3 * SIZE, generator=torch.Generator().manual_seed(seed))
    tokens = [source.randrange(VOCAB) for _ in range(LENGTH + 1)]
    pool = BlockPool(4 * LENGTH // BLOCK, BLOCK)
    pieces, whole = (Eagle3Drafter("head", runner, LAYERS, pool, (0,), budget) for budget in (90, LENGTH))
    told = read = 0
    while told < LENGTH:
        stop = min(LENGTH, told + source.choice((1, 2, 3, 8, 40, MOST_PENDING + 20)))
        again = source.choice((0, 0, 0, 5))
        tell(pieces, max(0, told - again), stop, features, spare=source.choice((0, 3)))
        told = stop
        if source.random() < 0.02 or told == LENGTH:
            # Whatever is further back than a draft can go, nobody was told.
            tell(whole, max(read, told - MOST_PENDING), told, features)
            read = told
            found, expected = draft(pieces, tokens[: told + 1]), draft(whole, tokens[: told + 1])
            assert found.tokens == expected.tokens
            assert len(found.tokens) == 4
            assert found.confidences == pytest.approx(expected.confidences, abs=1e-5)
