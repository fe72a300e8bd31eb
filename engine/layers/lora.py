"""Low-rank adapters in the layers of a model: each row gets the change of its own adapter, or none.

`KernelAdapters` computes with any kernels, operator by operator; `native_lora` has the CPU kernels' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.decoder import Adapter, Decoder, DecoderLayer, LayerShape, Tap
from pilotfish.engine.layers.operator_decoder import OperatorDecoder


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """The change b @ a of the outputs of a linear from `first` on."""

    first: int
    a: torch.Tensor  # (rank, in_features)
    b: torch.Tensor  # (outputs that it changes, rank)


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """What an adapter changes in a linear, which may be several matrices fused into one."""

    out_features: int
    parts: Seq[LowRankPart]  # no two of them change the same output


class LoadedAdapters(Protocol):
    """All adapters of a model, by their numbers."""

    @property
    def layers(self) -> Seq[Adapter]:
        """One for each of the model's layers."""
        ...

    def put(self, number: int, changes: Seq[Mapping[str, LowRankChange]]) -> None:
        """Add an adapter: of each layer, its changes by the names of linears (see `Adapter`), in the model's dtype and
        on its device."""
        ...

    def drop(self, number: int) -> None:
        """Free an adapter that no row will have any more."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    a: PreparedLinear  # (rank, in_features)
    b: PreparedLinear  # (out_features, rank)


class KernelAdapters:
    """Adapters for any kernels: two products for each adapter of a batch."""

    def __init__(self, kernels: Kernels[Any], count: int) -> None:
        self.layers = [_KernelAdapter(kernels) for _ in range(count)]
        self._kernels = kernels

    def put(self, number: int, changes: Seq[Mapping[str, LowRankChange]]) -> None:
        """See `LoadedAdapters`."""
        for layer, own in zip(self.layers, changes, strict=True):
            layer.loaded[number] = {name: self._prepared(change) for name, change in own.items()}

    def drop(self, number: int) -> None:
        """See `LoadedAdapters`."""
        for layer in self.layers:
            layer.loaded.pop(number, None)

    def _prepared(self, change: LowRankChange) -> _Prepared:
        """The parts' `a` one below the other, their `b` along the diagonal: two products instead of two for each."""
        a = torch.cat([part.a for part in change.parts])
        b = a.new_zeros(change.out_features, len(a))
        column = 0
        for part in change.parts:
            rows, rank = part.b.shape
            b[part.first : part.first + rows, column : column + rank] = part.b
            column += rank
        return _Prepared(self._kernels.prepare_linear(a), self._kernels.prepare_linear(b))


class _KernelAdapter:
    def __init__(self, kernels: Kernels[Any]) -> None:
        self.loaded: dict[int, dict[str, _Prepared]] = {}
        self._kernels = kernels

    def add_(self, name: str, x: torch.Tensor, y: torch.Tensor, batch: AttentionBatch) -> None:
        """See `Adapter.add_`. An adapter's rows are computed together, but none depends on another where the kernels
        are batch-invariant."""
        kernels = self._kernels
        for number, rows in batch.adapters:
            change = self.loaded[number].get(name)
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
