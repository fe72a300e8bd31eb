"""Low-rank adapters in a layer: each row gets the change of its own adapter, or none."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.decoder import Decoder, DecoderLayer, LayerShape, Tap
from pilotfish.engine.layers.operator_decoder import OperatorDecoder


@dataclass(frozen=True, slots=True)
class PreparedLowRank:
    a: PreparedLinear  # (rank, in_features)
    b: PreparedLinear  # (out_features, rank)


class LayerAdapters:
    """The `Adapter` of one layer: all adapters that are loaded, by their numbers."""

    def __init__(self, kernels: Kernels[Any]) -> None:
        self._kernels = kernels
        self._loaded: dict[int, dict[str, PreparedLowRank]] = {}

    def put(self, number: int, changes: dict[str, PreparedLowRank]) -> None:
        self._loaded[number] = changes

    def drop(self, number: int) -> None:
        self._loaded.pop(number, None)

    def add_(self, name: str, x: torch.Tensor, y: torch.Tensor, batch: AttentionBatch) -> None:
        """See `Adapter.add_`. An adapter's rows are computed together, but none depends on another where the kernels
        are batch-invariant."""
        kernels = self._kernels
        for number, rows in batch.adapters:
            change = self._loaded[number].get(name)
            if change is None:
                continue
            own = x if rows is None else x[rows]
            added = kernels.linear(kernels.linear(own, change.a), change.b)
            if rows is None:
                y += added
            else:
                y[rows] += added


class AdaptedDecoder:
    """Runs passes without adapters as the model would without any, and the others operator by operator, to the same
    bits of the rows that have none."""

    def __init__(self, plain: Decoder, adapted: OperatorDecoder) -> None:
        self.plain, self.adapted = plain, adapted
        self.layers: Seq[DecoderLayer] = plain.layers
        self.shape: LayerShape = plain.shape

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: Tap | None = None,
        given: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Decoder.forward`."""
        decoder = self.adapted if batch.adapters else self.plain
        return decoder.forward(hidden, positions, batch, caches, tap, given)
