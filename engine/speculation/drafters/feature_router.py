"""From the target's tap to the drafters that read its hidden states: each gets the columns of its own layers, of the
rows that stay. Most of them are read much later or never, so nothing is copied for them at most steps."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from pilotfish.engine.models.features import FeatureRows, FeatureTap
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import FeatureReader

FEW = 16
"""Rows of a sequence that are kept together with the whole pass's. Of a pass with more of one, which is a prompt's,
each sequence's are copied: else whoever keeps a few would keep the prompt's as well."""


class KeptRows(NamedTuple):
    """The rows of a pass that stay in a sequence."""

    sequence: Sequence
    start: int
    """The sequence's position of the first of them."""
    first: int
    """The rows are [first, stop) of the pass."""
    stop: int


class FeatureRouter:
    """`drafters`: of any kind; those that read no features get none."""

    def __init__(self, drafters: Iterable[object]) -> None:
        self._readers = [each for each in drafters if isinstance(each, FeatureReader)]
        self.layers: tuple[int, ...] = tuple(
            dict.fromkeys(layer for reader in self._readers for layer in reader.feature_layers)
        )
        """The layers that the target's tap has to take, each once."""

    def tap(self) -> FeatureTap | None:
        """For the target's next pass."""
        return FeatureTap(self.layers) if self.layers else None

    def publish(self, features: torch.Tensor, kept: Iterable[KeptRows]) -> None:
        """Give each reader its columns of the tap's features, (rows, len(layers) * hidden_size), which are not written
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
        """(rows, len(layers) * hidden_size), copied only where these layers are not all."""
        if layers == self.layers:
            return features
        by_layer = dict(zip(self.layers, features.chunk(len(self.layers), dim=1), strict=True))
        return torch.cat([by_layer[layer] for layer in layers], dim=1)


def _cut(features: torch.Tensor, kept: Seq[KeptRows]) -> list[FeatureRows]:
    if all(each.stop - each.first <= FEW for each in kept):
        return [FeatureRows(features, each.first, each.stop) for each in kept]
    return [FeatureRows(features[each.first : each.stop].clone(), 0, each.stop - each.first) for each in kept]
