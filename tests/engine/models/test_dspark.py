"""DSpark's heads: their layouts, tensor by tensor, and their published architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.checkpoints.huggingface import is_dflash, is_dspark
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.models import dflash_checkpoint
from pilotfish.engine.models.config import SEQUENTIAL
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.speculation.drafters.block_drafter import BlockDrafter
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.registry import kind_of
from pilotfish.engine.weights import int8
from pilotfish.errors import ModelError
from tests.engine.models.test_dflash import block_spans, make_runner
from tests.engine.speculation.drafters.test_block_drafter import sequence_of
from tests.support import block_drafts as drafts
from tests.support.block_drafts import BLOCK, DEEPSPEC, HIDDEN, MASK, SPECULATORS, VOCAB


@pytest.mark.parametrize("kind", SEQUENTIAL)
@pytest.mark.parametrize("layout", ["DeepSpec", "speculators"])
def test_a_public_layout_tensor_by_tensor(layout: str, kind: str, tmp_path: Path) -> None:
    config, vocab = (DEEPSPEC, 0) if layout == "DeepSpec" else (SPECULATORS, 32)
    stored = drafts.random_tensors(draft_vocab=vocab, embedding=not vocab, head=True)
    stored |= drafts.dspark_tensors(kind, draft_vocab=vocab)
    folder = drafts.write(tmp_path, drafts.dspark(config, kind), stored)
    assert is_dspark(folder)
    assert not is_dflash(folder)
    assert kind_of(ModelFiles("x", "huggingface", folder)).name == "dspark"
    shape = dflash_checkpoint.read_config(folder)
    assert (shape.sequential, shape.rank, shape.confidence, shape.first_drafts) == (kind, 8, True, True)
    assert shape.length == BLOCK
    read = dflash_checkpoint.read_weights(folder, shape, torch.float32)
    read.pop("target_ids", None)
    expected = {name: tensor for name, tensor in stored.items() if name not in ("d2t", "t2d")}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"markov_head_type": "lstm"}, "markov_head_type is 'lstm'"),
        ({"markov_rank": -1}, "markov_rank is -1"),
        ({"markov_rank": 0}, "markov_rank is 0"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = drafts.write(tmp_path, drafts.dspark(DEEPSPEC, "vanilla") | change, {"x": torch.zeros(1)})
    with pytest.raises(ModelError, match=said):
        dflash_checkpoint.read_config(folder)


@pytest.mark.parametrize("kind", SEQUENTIAL)
def test_drafts_are_those_of_the_published_architecture(kernels: str, kind: str, tmp_path: Path) -> None:
    """Two sequences, whose chains differ in length: tokens and confidences are those of plain torch."""
    torch.manual_seed(0)
    tensors = drafts.random_tensors(draft_vocab=32) | drafts.dspark_tensors(kind, draft_vocab=32)
    quantized = {**tensors}  # the table whose rows are looked up is whole again
    name = "markov_head.markov_w1.weight"
    quantized[name], quantized[f"{name}_scale"] = int8.quantize(tensors[name])
    tensors[name] = quantized[name] * quantized[f"{name}_scale"]
    folder = drafts.write(tmp_path, drafts.dspark(SPECULATORS, kind), quantized)
    embedding = torch.randn(VOCAB, HIDDEN) * 0.1
    runner = make_runner(kernels, folder, embedding, embedding)
    drafter = BlockDrafter("block", runner, BlockPool(12, runner.block_size), (0,), 64)
    features, lasts, limits = torch.randn(24, 3 * HIDDEN), (17, 40), (5, 3)
    sequences = []
    for i, last in enumerate(lasts):
        sequences.append(sequence_of([1] * (20 + i) + [last], str(i), bytes([i])))
        drafter.observe_features(sequences[-1], 0, FeatureRows(features, 0, 20 + i))
    found = drafter.propose([DraftRequest(s, limit) for s, limit in zip(sequences, limits, strict=True)])
    ids = (tensors["d2t"] + torch.arange(32)).tolist()
    for i, (draft, last, limit) in enumerate(zip(found, lasts, limits, strict=True)):
        hidden = drafts.block_hidden(
            tensors, features[: 20 + i], embedding[torch.tensor([last] + [MASK] * (BLOCK - 1))]
        )
        logits = hidden @ tensors["lm_head.weight"].T
        tokens, confidences = drafts.chain(tensors, kind, hidden, logits, last, ids)
        assert draft.tokens == tuple(tokens[:limit])
        assert draft.confidences == pytest.approx(confidences[:limit], abs=1e-4)
    # Not what the rows say by themselves.
    assert found[0].tokens != tuple(ids[column] for column in logits.argmax(1))


def test_a_chain_ends_where_the_confidence_head_says(tmp_path: Path) -> None:
    tensors = drafts.random_tensors(draft_vocab=32) | drafts.dspark_tensors("rnn", draft_vocab=32)
    folder = drafts.write(tmp_path, drafts.dspark(SPECULATORS, "rnn"), tensors)
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.1
    runner = make_runner("torch", folder, embedding, embedding)
    drafter = BlockDrafter("block", runner, BlockPool(12, runner.block_size), (0,), 64)
    for name, params in (("a", SamplingParams(max_tokens=99, temperature=0.0)), ("b", SamplingParams(max_tokens=99))):
        sequence = sequence_of([1] * 20 + [17], name, name.encode(), params)
        drafter.observe_features(sequence, 0, FeatureRows(torch.ones(20, 3 * HIDDEN), 0, 20))
        (whole,) = drafter.propose([DraftRequest(sequence, 9)])
        assert len(whole.tokens) == BLOCK
        product = whole.confidences[0] * whole.confidences[1]
        (part,) = drafter.propose([DraftRequest(sequence, 9, floor=product * 1.01)])
        assert part.tokens == whole.tokens[:2]


def test_a_drafter_of_deepspec_s_without_a_sequential_head_may_have_confidences(tmp_path: Path) -> None:
    config = DEEPSPEC | {"enable_confidence_head": True, "confidence_head_with_markov": False}
    tensors = drafts.random_tensors(embedding=True, head=True)
    tensors |= {"confidence_head.proj.weight": torch.ones(1, HIDDEN), "confidence_head.proj.bias": torch.zeros(1)}
    runner = make_runner("torch", drafts.write(tmp_path, config, tensors), tensors["lm_head.weight"], torch.ones(1, 1))
    runner.read([Span([0] * 5, 0, [0, 1])], torch.ones(5, 3 * HIDDEN))
    hidden, _ = runner.run(block_spans(3, 5, [0, 1]))
    assert runner.model.heads is not None
    bias, confidence, _ = runner.model.heads.step(hidden, torch.zeros(BLOCK, dtype=torch.int64), hidden[:, :0])
    assert bias is None
    torch.testing.assert_close(confidence, hidden.sum(1).sigmoid())
