"""Checks of captured passes (CUDA graphs) against the same passes launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.buckets import buckets, fitting
from pilotfish.engine.execution.graphs import CudaGraphs, EagerGraphs, GraphBackend, GraphPlan, graph_backend
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.tools.selftest.check import Check, Finding, Skip
from pilotfish.tools.selftest.logits import BOUNDS, UNIT, gaps
from pilotfish.tools.selftest.subject import Subject, ignore

SEQUENCES, LONGEST, DRAFTED = 8, 512, 4
BATCHES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((9, 1),),
    ((200, 1), (9, 1), (33, 1), (127, 1)),
    ((40, 5), (300, 5)),
    ((17, 1), (60, 5), (129, 3)),  # filled up to the bucket's length and number
    ((255, 2), (31, 1), (32, 1), (64, 2), (100, 1)),
    ((70, 1), (16, 25), (81, 5)),  # with a chunk of a prompt
    ((9, 1),),  # once more: nothing of the larger ones is left
)
"""(tokens in the cache, tokens of the span) of each sequence of each batch."""
BUCKETS = buckets(SEQUENCES, DRAFTED, 64)
REPLAY_WHY = "the same kernels on the same padded buffers: a replay must give the very same bits"
PADDED_WHY = "rows of padding may make a product or an attention kernel round otherwise; the native kernels never"


def checks(subject: Subject) -> Iterator[Check]:
    passes = _Passes(subject)
    compares = "a graph's replays with the same passes eagerly, on the same buffers"
    yield Check("replayed passes", compares, passes.replayed, "wrong numbers", REPLAY_WHY)
    compares = "passes padded to their buckets with passes of just their rows"
    yield Check("padded passes", compares, passes.padded, UNIT, PADDED_WHY)


@dataclass
class _Passes:
    subject: Subject

    @cached_property
    def loaded(self) -> tuple[DecoderModel, Platform]:
        folder = self.subject.small("llama")
        platform = self.subject.platform if self.subject.platform.needs.head_dim == 64 else None
        model, platform, _ = load_model(str(folder), platform, self.subject.small_config(folder), LONGEST, ignore)
        return model, platform

    def replayed(self) -> Finding:
        _, platform = self.loaded
        if platform.device.type != "cuda":
            raise Skip(f"there are no CUDA graphs on {platform.device}")
        if graph_backend(False, platform.attention, platform.device) is None:
            raise Skip(f"attention by {platform.attention.name} cannot be captured")
        graphs = self._logits(lambda: CudaGraphs(platform.device))
        eager = self._logits(EagerGraphs)
        wrong = sum(int((one != other).sum()) for one, other in zip(graphs, eager, strict=True))
        numbers = sum(each.numel() for each in graphs)
        return Finding(
            measured=wrong, bound=0, detail=f"of {numbers:,}; {_captured()} of {len(BATCHES)} batches in a bucket"
        )

    def padded(self) -> Finding:
        _, platform = self.loaded
        if not platform.attention.capturable:
            raise Skip(f"attention by {platform.attention.name} cannot be captured, so that nothing is padded")
        padded, plain = self._logits(EagerGraphs), self._logits(None)
        gap = max(float(gaps(one, other).max()) for one, other in zip(padded, plain, strict=True))
        bound = 0.0 if platform.kernels_name == "native" else BOUNDS[platform.dtype]
        return Finding(measured=gap, bound=bound, detail=f"{_captured()} of {len(BATCHES)} batches in a bucket")

    def _logits(self, make: Callable[[], GraphBackend] | None) -> list[torch.Tensor]:
        """Return the logits of all rows of each batch, float32 on the CPU, by captured passes or (None) by plain
        ones."""
        model, platform = self.loaded
        size, count = platform.block_size, SEQUENCES * -(-LONGEST // platform.block_size)
        caches = kv_cache.allocate(
            model.config, platform.attention, count + 1, size, platform.cache_dtype, platform.device
        )
        runner = ModelRunner(model, caches, size, platform.device)
        each = count // SEQUENCES
        tables = [list(range(i * each, (i + 1) * each)) for i in range(SEQUENCES)]
        tokens = self.subject.tokens(LONGEST, model.config.vocab_size, seed=5)
        runner.run([Span(tokens[i : i + LONGEST - 64], 0, table) for i, table in enumerate(tables)])
        if make is not None:
            plan = GraphPlan(
                backend=make(),
                buckets=BUCKETS,
                max_len=LONGEST,
                padding_block=count,
                memory=1 << 30,
            )
            runner.capture("small model", plan)
        found = []
        for batch in BATCHES:
            spans = [
                Span(tokens[at : at + length], at, table, logit_rows=length)
                for (at, length), table in zip(batch, tables, strict=False)
            ]
            found.append(runner.run(spans).float().cpu().clone())
        return found


def _captured() -> int:
    """Return the number of batches that a captured pass exists for."""
    found = [
        fitting(BUCKETS, len(lengths), max(lengths), sum(lengths), sum(lengths))
        for lengths in ([length for _, length in batch] for batch in BATCHES)
    ]
    return sum(bucket is not None for bucket in found)
