"""The way of the target's features to the drafters that read them: the right columns of the right rows, and no memory
of rows that nobody wants."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.feature_router import FEW, FeatureRouter, KeptRows
from pilotfish.engine.speculation.drafters.ngram import NgramDrafter

HIDDEN = 4


@dataclass
class Reader:
    name: str
    feature_layers: tuple[int, ...]
    seen: list[tuple[str, int, FeatureRows]] = field(default_factory=list)

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        self.seen.append((sequence.id, start, features))


def sequence(name: str, *drafters: str) -> Sequence:
    request = Request(id=name, prompt_ids=(1,), params=SamplingParams(max_tokens=9))
    return Sequence(request, 0, BlockTable(BlockPool(1, 16)), drafters)


def taken(router: FeatureRouter, hidden: dict[int, torch.Tensor]) -> torch.Tensor:
    """What the tap has of a pass with these hidden states."""
    tap = router.tap()
    assert tap is not None
    for layer, states in hidden.items():
        tap.take(layer, states)
    assert tap.features is not None
    return tap.features


@pytest.mark.parametrize("prompt", [0, FEW + 1])
def test_every_reader_gets_its_layers_of_the_rows_that_stay(prompt: int) -> None:
    """With a prompt in the same pass, and without."""
    readers = [Reader("a", (1, 3, 5)), Reader("b", (5, 0)), Reader("c", (1, 3, 5))]
    router = FeatureRouter([NgramDrafter(4, 1), *readers])
    assert router.layers == (1, 3, 5, 0)
    rows = 5 + prompt
    hidden = {layer: torch.randn(rows, HIDDEN) for layer in range(7)}
    all_of_them, none, one = sequence("x", "a", "b", "c"), sequence("y", "ngram"), sequence("z", "ngram", "c")
    kept = [KeptRows(all_of_them, 10, 0, 2), KeptRows(none, 4, 2, 3), KeptRows(one, 7, 3, rows)]
    router.publish(taken(router, hidden), kept)
    for reader in readers:
        whole = torch.cat([hidden[layer] for layer in reader.feature_layers], dim=1)
        expected = [("x", 10, whole[0:2])] if reader.name != "c" else [("x", 10, whole[0:2]), ("z", 7, whole[3:rows])]
        assert [(name, start) for name, start, _ in reader.seen] == [each[:2] for each in expected]
        for (_, _, features), (_, _, wanted) in zip(reader.seen, expected, strict=True):
            assert len(features) == len(wanted)
            assert torch.equal(features.read(), wanted)


def test_whoever_keeps_a_few_rows_does_not_keep_a_prompt() -> None:
    router = FeatureRouter([reader := Reader("a", (0, 1))])
    hidden = {layer: torch.randn(500, HIDDEN) for layer in range(2)}
    kept = [KeptRows(sequence("x", "a"), 0, 0, 498), KeptRows(sequence("y", "a"), 9, 498, 500)]
    router.publish(taken(router, hidden), kept)
    assert [len(features.features) for _, _, features in reader.seen] == [498, 2]


def test_nobody_reads() -> None:
    router = FeatureRouter([NgramDrafter(4, 1)])
    assert router.layers == ()
    assert router.tap() is None
