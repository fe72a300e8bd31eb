"""Runs the engine's model and transformers' on the same tokens, for the tests that compare their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.decoder_model import DecoderModel

KernelsName = Literal["native", "torch", "triton"]

BLOCKS = [5, 2, 7, 1]  # of 8: out of order, so that a row that goes to the wrong place is seen
OTHERS = [0, 6, 4, 3]


class DecoderRunner(ModelRunner):
    """A ModelRunner of a model that the engine computes itself."""

    model: DecoderModel


def runner_of(
    model: str, kernels: KernelsName, num_blocks: int = len(BLOCKS) + len(OTHERS), **settings: Any
) -> DecoderRunner:
    """`settings`: fields of EngineConfig, beside or instead of those here."""
    config = EngineConfig(**{"model": model, "dtype": "float32", "device": "cpu", "kernels": kernels} | settings)
    loaded, platform, _ = load_model(model, None, config, 0, lambda what, share: None)
    assert platform.kernels.name == kernels
    size = platform.block_size
    caches = kv_cache.allocate(
        loaded.config, platform.attention, num_blocks, size, platform.cache_dtype, platform.device
    )
    for cache in caches if platform.attention.name != "flash4" else ():  # which reads zeros where nothing was written
        for part in (cache.keys, cache.values):  # what was never written shows if it is read
            part.fill_(torch.nan if part.is_floating_point() else -1)  # scales of four bytes of -1 are NaN, too
    return DecoderRunner(loaded, caches, size, platform.device)


class Runner(Protocol):
    """A ModelRunner, or several in step."""

    def run(self, spans: list[Span], /) -> torch.Tensor: ...


def in_pieces(runner: Runner, tokens: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
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
