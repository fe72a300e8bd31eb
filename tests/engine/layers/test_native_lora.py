"""Adapters of the native kernels: what they add, to the same bits however rows are batched and by either decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish.engine.execution.batch import Span
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.fused_decoder import FusedDecoder
from pilotfish.engine.layers.lora import LowRankChange, LowRankPart
from pilotfish.engine.layers.native_lora import NativeAdapters
from pilotfish.engine.layers.operator_decoder import OperatorDecoder
from tests.support.adapters import write_adapter
from tests.support.native import LEVELS, needs_native
from tests.support.parity import BLOCKS, OTHERS, runner_of
from tests.support.tiny import build_model

pytestmark = needs_native

IN, OUT = 160, 77
RANKS = {1: (3, 20), 2: (16,), 3: (40, 5), 7: (1,)}
"""Of the parts of each adapter, by its number."""
FIRST = (0, 48)
"""The first output of each part, and how many there are: one not of whole registers, and some that none changes."""
SIZES = (37, 29)


def change(generator: torch.Generator, ranks: tuple[int, ...]) -> LowRankChange:
    return LowRankChange(
        OUT,
        [
            LowRankPart(first, torch.randn(rank, IN, generator=generator), torch.randn(size, rank, generator=generator))
            for first, size, rank in zip(FIRST, SIZES, ranks, strict=False)
        ],
    )


def batch_of(numbers: list[int]) -> Any:
    """What the adapters read of a batch whose rows have these."""
    owned = {n: torch.tensor([i for i, number in enumerate(numbers) if number == n]) for n in sorted({*numbers} - {0})}
    whole = len(owned) == 1 and 0 not in numbers
    return SimpleNamespace(
        slots=torch.zeros(len(numbers), dtype=torch.int64),
        adapters=tuple((number, None if whole else rows) for number, rows in owned.items()),
    )


@pytest.fixture
def three_threads() -> Iterator[None]:
    kernels = NativeKernels()
    before = kernels.threads
    kernels.set_threads(3)
    yield
    kernels.set_threads(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.usefixtures("three_threads")
def test_rows_get_their_own_adapters_change_and_no_other(level: int) -> None:
    generator = torch.Generator().manual_seed(1)
    kernels = NativeKernels(level)
    adapters = NativeAdapters(kernels, 1)
    changes = {number: change(generator, ranks) for number, ranks in RANKS.items()}
    for number, each in changes.items():
        adapters.put(number, [{"qkv": each}])
    (layer,) = adapters.layers
    numbers = [0, 1, 2, 2, 0, 3, 1, 7, *[3] * 40, 1, 0]
    x, y = torch.randn(len(numbers), IN, generator=generator), torch.randn(len(numbers), OUT, generator=generator)
    wanted, found = y.double(), y.clone()
    for row, number in enumerate(numbers):
        for part in changes[number].parts if number else ():
            wanted[row, part.first : part.first + len(part.b)] += part.b.double() @ (part.a.double() @ x[row].double())
    layer.add_("qkv", x, found, batch_of(numbers))
    layer.add_("down", x, found, batch_of(numbers))  # which no adapter changes
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    untouched = [row for row, number in enumerate(numbers) if number == 0]
    assert torch.equal(found[untouched], y[untouched])
    kernels.set_threads(1)
    for row, number in enumerate(numbers):
        alone = y[row : row + 1].clone()
        layer.add_("qkv", x[row : row + 1], alone, batch_of([number]))
        assert torch.equal(alone[0], found[row])


@pytest.mark.usefixtures("three_threads")
def test_threads_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    kernels = NativeKernels()
    adapters = NativeAdapters(kernels, 1)
    for number in (1, 2):
        adapters.put(number, [{"qkv": change(generator, RANKS[3])}])
    batch = batch_of([1, 2] * 1000)
    x, y = torch.randn(2000, IN, generator=generator), torch.randn(2000, OUT, generator=generator)
    found = [y.clone() for _ in range(10)]
    for each in found:
        adapters.layers[0].add_("qkv", x, each, batch)
    kernels.set_threads(1)
    alone = y.clone()
    adapters.layers[0].add_("qkv", x, alone, batch)
    assert all(torch.equal(each, alone) for each in found)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3"])
def test_both_decoders_give_the_same_bits(tiny: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """gemma3 has norms of what is added; the second adapter changes some linears only, and the third is wide."""
    fused, apart = (runner_of(str(tiny(kind)), "native", lora_updates=True) for _ in range(2))
    for i, options in enumerate(({"rank": 4}, {"rank": 3, "targets": r".*\.(o|gate|qkv)_proj"}, {"rank": 33})):
        folder = write_adapter(tmp_path / f"{i}", build_model(kind), seed=i, **options)  # type: ignore[arg-type]
        for runner in (fused, apart):
            assert runner.model.adapters is not None
            assert runner.model.adapters.load(folder) == i + 1
    decoder = apart.model.decoder
    assert isinstance(fused.model.decoder, FusedDecoder)
    assert isinstance(decoder, FusedDecoder)
    assert decoder._adapters is not None
    layers = [
        dataclasses.replace(layer, adapter=own)
        for layer, own in zip(decoder.layers, decoder._adapters.layers, strict=True)
    ]
    kernels = NativeKernels()
    apart.model.decoder = OperatorDecoder(kernels, NativeAttention(kernels), ALONE, layers, decoder.shape)
    tokens = torch.randint(512, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    for first, second in ((1, 2), (3, 0), (2, 2), (0, 1), (0, 0)):
        for begin, end in ((0, 17), (17, 18), (18, 23)):
            spans = [Span(tokens[begin:end], begin, blocks, end - begin, number) for blocks, number in (
                (BLOCKS, first), (OTHERS, second),
            )]  # fmt: skip
            assert torch.equal(fused.run(spans), apart.run(spans))


def test_slots_of_adapters_that_are_gone_are_given_away_again() -> None:
    generator = torch.Generator().manual_seed(1)
    adapters = NativeAdapters(NativeKernels(), 2)
    x, batches = torch.randn(1, IN, generator=generator), [batch_of([number]) for number in range(1, 60)]
    for number in range(1, 50):
        own = change(generator, (4,))
        adapters.put(number, [{}, {"qkv": own}])
        found = torch.zeros(1, OUT)
        adapters.layers[1].add_("qkv", x, found, batches[number - 1])
        torch.testing.assert_close(found[0, : SIZES[0]], own.parts[0].b @ (own.parts[0].a @ x[0]), rtol=0, atol=1e-3)
        if number > 3:
            adapters.drop(number - 3)
            adapters.drop(number - 3)
    assert set(adapters._slots.values()) < {0, 1, 2, 3}
    assert len(adapters.layers[1].linear("qkv")._parts) == 3
