"""Models that are divided over ranks: the same logits as transformers', and as the model that is not divided.

Float32 sums in another order differ by some units in the last place; `test_model_parity` says how far that goes. Where
the kernels promise bit-equal rows, that is checked to the bit. Ranks are threads here, see `ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import BLOCKS, OTHERS, KernelsName, in_pieces, logits_of
from ranks import RankedRunner
from tiny import KINDS, build_model, make_tiny

from engine.kernels.native import load_library

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2  # 40 tokens
WHOLE, MIXED = (40,), (7, 8, 24, 25, 26, 31, 40)  # prefill in chunks, decoding, verification of several

SIZES = (1, 2, 3, 4)
DIVISIBLE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 12,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
"""By all of SIZES; the vocabulary, 512, does not divide by 3."""
KV_HEADS = {1: 4, 2: 4, 3: 3, 4: 2}
"""Split, and replicated where there are more ranks than heads."""


def shape(kind: str, size: int) -> dict[str, Any]:
    own: dict[str, Any] = DIVISIBLE | {"num_key_value_heads": 12 if kind == "llama2" else KV_HEADS[size]}
    if kind == "gemma3":  # one key-value head, which is on all ranks
        own |= {"num_key_value_heads": 1, "num_hidden_layers": 4}
    return own


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> KernelsName:
    if request.param == "native" and load_library() is None:
        pytest.skip("the native kernels were not built here (no C compiler)")
    return request.param


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A model of that kind that divides by so many ranks."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, size: int) -> Path:
        key = kind, shape(kind, size)["num_key_value_heads"]
        if key not in made:
            made[key] = make_tiny(
                kind, tmp_path_factory.mktemp("models") / "-".join(map(str, key)), **shape(kind, size)
            )
        return made[key]

    return folder


def ranked(model: Path, size: int, kernels: str, **settings: Any) -> RankedRunner:
    return RankedRunner(str(model), size, len(BLOCKS) + len(OTHERS), kernels=kernels, **settings)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(divisible, kernels: KernelsName, kind: str, size: int) -> None:
    runner = ranked(divisible(kind, size), size, kernels)
    assert runner.platform.kernels.name == kernels
    wanted = logits_of(build_model(kind, **shape(kind, size)), PROMPT)
    for ends in (WHOLE, MIXED):
        found = in_pieces(runner, PROMPT, ends)
        assert found.shape == (40, 512)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
