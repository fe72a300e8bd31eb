"""What a model is to everything above it: rows in, hidden states and logits out. One file per architecture."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.layers.attention.interface import AttentionBatch, LayerCache
from engine.models.config import ModelConfig


class Model(Protocol):
    @property
    def config(self) -> ModelConfig: ...

    def forward(
        self,
        token_ids: torch.Tensor,  # (rows,) int64
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],  # one for each layer
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: (rows, hidden_size). The rows' keys and values are
        in the caches afterwards."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, vocab_size)."""
        ...
