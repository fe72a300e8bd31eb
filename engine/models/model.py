"""What a model is to everything above it: rows in, hidden states and logits out. One file per architecture."""

from __future__ import annotations

from typing import Protocol

import torch

from pilotfish.engine.kernels.protocol import PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.models.layout import Layout


class Model(Protocol):
    """One rank's part of it, where it is divided over several: all of them call the same methods with the same rows."""

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""
        ...

    @property
    def comm(self) -> Communicator: ...

    @property
    def layout(self) -> Layout: ...

    embedding: PreparedLinear  # (layout.vocab_part, hidden_size)
    head: PreparedLinear  # the same; the embedding itself where they are tied

    def forward(
        self,
        token_ids: torch.Tensor,  # (rows,) int64
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],  # one for each layer
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: (rows, hidden_size). The rows' keys and values are
        in the caches afterwards, and what `tap` wants of the layers in between is in it."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, vocab_size), on rank 0; what it returns elsewhere is
        not to be read."""
        ...
