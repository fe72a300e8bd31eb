"""The feature router passes the target's hidden states to the drafters that read them: each gets the columns of its
layers, of the committed rows. Most are read much later or never, so most steps copy nothing."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from pilotfish.engine.models.features import FeatureRows, FeatureTap
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import FeatureReader

FEW = 16
"""Maximum rows of a sequence that are kept as a view of the whole pass. If one has more, which are a prompt's, each
sequence's rows are copied: else a view of a few rows would keep the whole prompt's alive."""


class KeptRows(NamedTuple):
    """A sequence's committed rows of a pass."""

    sequence: Sequence
    start: int
    """Position in the sequence of the first of them."""
    first: int
    """The rows are [first, stop) of the pass."""
    stop: int


class FeatureRouter:
    """Routes features to those of `drafters` that are a `FeatureReader`."""

    def __init__(self, drafters: Iterable[object]) -> None:
        self._readers = [each for each in drafters if isinstance(each, FeatureReader)]
        self.layers: tuple[int, ...] = tuple(
            dict.fromkeys(layer for reader in self._readers for layer in reader.feature_layers)
        )
        """The layers that the target's tap takes, each once."""

    def tap(self) -> FeatureTap | None:
        """Return a tap for the target's next pass; None if no drafter reads features."""
        return FeatureTap(self.layers) if self.layers else None

    def publish(self, features: torch.Tensor, kept: Iterable[KeptRows]) -> None:
        """Pass each reader its columns of the tap's features, (rows, len(layers) * hidden_size), which are not written
        to any more."""
        names = {reader.name for reader in self._readers}
        read = [each for each in kept if not names.isdisjoint(each.sequence.drafters)]
        cut: dict[tuple[int, ...], list[FeatureRows]] = {}
        for reader in self._readers:
            layers = reader.feature_layers
            if layers not in cut:
                cut[layers] = _cut(self._columns(layers, features), read)
            for each, rows in zip(read, cut[layers], strict=True):
                if reader.name in each.sequence.drafters:
                    reader.observe_features(each.sequence, each.start, rows)

    def _columns(self, layers: tuple[int, ...], features: torch.Tensor) -> torch.Tensor:
        """Return the columns of `layers`, (rows, len(layers) * hidden_size), copied only if they are not all layers."""
        if layers == self.layers:
            return features
        by_layer = dict(zip(self.layers, features.chunk(len(self.layers), dim=1), strict=True))
        return torch.cat([by_layer[layer] for layer in layers], dim=1)


def _cut(features: torch.Tensor, kept: Seq[KeptRows]) -> list[FeatureRows]:
    if all(each.stop - each.first <= FEW for each in kept):
        return [FeatureRows(features, each.first, each.stop) for each in kept]
    return [FeatureRows(features[each.first : each.stop].clone(), 0, each.stop - each.first) for each in kept]
