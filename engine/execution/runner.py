"""ModelRunner: spans in, logits out. One for each model: the target's and each draft's are the same kind."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch

from engine.execution.spans import HostBatch, Span, pack
from engine.layers.attention.interface import LayerCache
from engine.models.features import FeatureTap
from engine.models.interface import Model


class Runner(Protocol):
    """A ModelRunner, or one that has others compute with it (`engine.execution.group`)."""

    @property
    def model(self) -> Model: ...

    def run(self, spans: Seq[Span], tap: FeatureTap | None = None) -> torch.Tensor:
        """See ModelRunner."""
        ...

    def run_batch(self, host: HostBatch, tap: FeatureTap | None = None) -> torch.Tensor:
        """See ModelRunner."""
        ...


class ModelRunner:
    def __init__(self, model: Model, caches: list[LayerCache], block_size: int, device: torch.device) -> None:
        self.model = model
        self._caches = caches
        self.block_size = block_size
        self.device = device

    def run(self, spans: Seq[Span], tap: FeatureTap | None = None) -> torch.Tensor:
        """Compute the spans in one pass; afterwards their keys and values are in the cache, and all rows' features in
        `tap`.

        Returns the logits of each span's last `logit_rows` rows, spans in order: (sum of logit_rows, vocab_size), in
        the model's dtype.
        """
        return self.run_batch(pack(spans, self.block_size), tap)

    @torch.inference_mode()
    def run_batch(self, host: HostBatch, tap: FeatureTap | None = None) -> torch.Tensor:
        """`run`, of spans that are packed."""
        batch = host.to(self.device)
        hidden = self.model.forward(batch.token_ids, batch.positions, batch.attention, self._caches, tap)
        if len(batch.logit_rows) != len(hidden):
            hidden = hidden[batch.logit_rows]
        if not len(hidden):
            return hidden.new_empty(0, self.model.config.vocab_size)
        return self.model.logits(hidden)
