"""What a block drafter is told of a sequence, in whatever pieces, is what it drafts from, prefix cache included."""

from __future__ import annotations

import random

import pytest
import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.block_runner import BlockRunner
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models import dflash_checkpoint
from pilotfish.engine.models.dflash import DFlashModel
from pilotfish.engine.models.eagle3 import SharedWeights
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.block_drafter import BlockDrafter
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from tests.support import block_drafts as drafts
from tests.support.block_drafts import BLOCK, DIM, HIDDEN, KV_HEADS, LAYERS, SPECULATORS, VOCAB

SIZE, LENGTH = 16, 600
CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0.0)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> BlockRunner:
    folder = drafts.write(tmp_path_factory.mktemp("block"), SPECULATORS, drafts.random_tensors(draft_vocab=32))
    shape = dflash_checkpoint.read_config(folder)
    weights = dflash_checkpoint.read_weights(folder, shape, torch.float32)
    kernels, attention = TorchKernels(), TorchAttention()
    embedding = kernels.prepare_linear(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)))
    shared = SharedWeights(embedding, embedding)
    model = DFlashModel(shape, kernels, attention, weights, LENGTH + BLOCK, CPU, torch.float32, shared)
    count = 4 * LENGTH // SIZE
    return BlockRunner(
        model, [attention.allocate(count, SIZE, KV_HEADS, DIM, torch.float32, CPU) for _ in range(LAYERS)], SIZE, CPU
    )


def make(runner: BlockRunner, pool: BlockPool, budget: int = LENGTH, keep_probs: bool = False) -> BlockDrafter:
    return BlockDrafter("block", runner, pool, (0,), budget, keep_probs)


def sequence_of(
    tokens: list[int], name: str = "x", salt: bytes = b"", params: SamplingParams = GREEDY, seed: int = 0
) -> Sequence:
    request = Request(id=name, prompt_ids=(1,), params=params, salt=salt)
    sequence = Sequence(request, seed, BlockTable(BlockPool(1, SIZE)), ("block",))
    sequence.tokens[:] = tokens
    return sequence


def tell(drafter: BlockDrafter, sequence: Sequence, start: int, stop: int, features: torch.Tensor) -> None:
    rows = torch.cat([torch.full((2, 3 * HIDDEN), torch.nan), features[start:stop]])  # of a pass with others before
    drafter.observe_features(sequence, start, FeatureRows(rows, 2, 2 + stop - start))


def draft(drafter: BlockDrafter, sequence: Sequence, limit: int = BLOCK - 1, floor: float = 0.0) -> Draft:
    """Asked until it has read everything."""
    while True:
        backlog = drafter.backlog(sequence)
        (found,) = drafter.propose([DraftRequest(sequence, limit, floor)])
        if found.tokens:
            return found
        assert BLOCK < drafter.backlog(sequence) < backlog


def texts(seed: int) -> tuple[list[int], torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (LENGTH + 1,), generator=source).tolist(), torch.randn(
        LENGTH, 3 * HIDDEN, generator=source
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_do_not_matter(runner: BlockRunner, seed: int) -> None:
    """Pieces of any size, some of them twice, more than are kept; now and then a draft in between."""
    source = random.Random(seed)
    tokens, features = texts(seed)
    pool = BlockPool(4 * LENGTH // SIZE, SIZE)
    pieces, told = make(runner, pool, 90), 0
    while told < LENGTH:
        stop = min(LENGTH, told + source.choice((1, 2, 3, 8, 40, 300)))
        again = source.choice((0, 0, 0, 5))
        tell(pieces, sequence_of(tokens[: stop + 1]), max(0, told - again), stop, features)
        told = stop
        if source.random() < 0.05 or told == LENGTH:
            whole = make(runner, pool)
            tell(whole, sequence_of(tokens[: told + 1], "whole", b"apart"), 0, told, features)
            found = draft(pieces, sequence_of(tokens[: told + 1]))
            expected = draft(whole, sequence_of(tokens[: told + 1], "whole", b"apart"))
            assert found.tokens == expected.tokens
            assert len(found.tokens) == BLOCK - 1
            assert found.confidences == pytest.approx(expected.confidences, abs=1e-5)
            whole.release(sequence_of([], "whole"))
    pieces.release(sequence_of([]))
    assert pool.used == 0


@pytest.mark.parametrize(("salt", "shared"), [(b"", True), (b"other", False)])
def test_a_prefix_that_the_target_did_not_compute_again(runner: BlockRunner, salt: bytes, shared: bool) -> None:
    """Its features come from whoever had the same text before, unless they must not be shared."""
    tokens, features = texts(9)
    drafter = make(runner, BlockPool(4 * LENGTH // SIZE, SIZE))
    first = sequence_of(tokens[:101], "first")
    tell(drafter, first, 0, 100, features)
    wanted = draft(drafter, first)
    second = sequence_of(tokens[:101], "second", salt)
    tell(drafter, second, 96, 100, features)
    found = draft(drafter, second)
    assert (found.confidences == pytest.approx(wanted.confidences, abs=1e-5)) is shared
    # Without them it makes do with the rest.
    alone = make(runner, BlockPool(4 * LENGTH // SIZE, SIZE))
    third = sequence_of(tokens[:101], "third")
    tell(alone, third, 96, 100, features)
    assert (draft(alone, third).confidences == pytest.approx(found.confidences, abs=1e-5)) is not shared


def test_sequences_side_by_side_draft_what_they_draft_alone(runner: BlockRunner) -> None:
    params = (
        GREEDY,
        SamplingParams(max_tokens=9, temperature=1.0),
        SamplingParams(max_tokens=9, repetition_penalty=2.0),
    )
    drafter = make(runner, BlockPool(4 * LENGTH // SIZE, SIZE))
    sequences = []
    for i, (each, length) in enumerate(zip(params, (40, 7, 19), strict=True)):
        tokens, features = texts(i)
        sequences.append(sequence_of(tokens[: length + 1], str(i), bytes([i]), each, seed=i))
        tell(drafter, sequences[-1], 0, length, features)
    alone = [draft(drafter, sequence, limit) for sequence, limit in zip(sequences, (4, 1, 3), strict=True)]
    together = drafter.propose([DraftRequest(s, limit) for s, limit in zip(sequences, (4, 1, 3), strict=True)])
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [len(each.tokens) for each in together] == [4, 1, 3]
    assert drafter.passes == (3 * BLOCK,)


def test_a_draft_ends_where_its_confidence_does(runner: BlockRunner) -> None:
    tokens, features = texts(4)
    drafter, sequence = make(runner, BlockPool(99, SIZE)), sequence_of(tokens[:31])
    tell(drafter, sequence, 0, 30, features)
    whole = draft(drafter, sequence, limit=99)
    assert len(whole.tokens) == BLOCK - 1  # it has no more
    first, second = whole.confidences[:2]
    assert len(draft(drafter, sequence, floor=first * second * 1.01).tokens) == 2
    assert len(draft(drafter, sequence, floor=first * 1.01).tokens) == 1


def test_rejection_verification_gets_the_distributions(runner: BlockRunner) -> None:
    tokens, features = texts(5)
    params = SamplingParams(max_tokens=9, temperature=0.7)
    found = []
    for keep_probs in (True, False):
        drafter = make(runner, BlockPool(99, SIZE), keep_probs=keep_probs)
        sequence = sequence_of(tokens[:31], params=params, seed=4)
        tell(drafter, sequence, 0, 30, features)
        found.append(draft(drafter, sequence))
    kept, plain = found
    assert kept.tokens == plain.tokens
    assert plain.probs is None
    assert kept.probs is not None
    assert kept.probs.sum(1).tolist() == pytest.approx([1.0] * len(kept.tokens))
    at = torch.tensor(kept.tokens).unsqueeze(1)
    assert kept.probs.gather(1, at).squeeze(1).tolist() == pytest.approx(kept.confidences, abs=1e-5)
