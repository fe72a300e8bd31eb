"""Features: hidden states of a few of the target's layers, taken during its pass, for a head that reads them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch


class FeatureTap:
    """Takes the hidden states that enter layers `layers` (`num_layers`: that leave the last one, before the final
    norm), as Hugging Face numbers `hidden_states`. `features` is (rows, len(layers) * hidden_size) after a pass, in the
    model's dtype, the layers side by side in the order of `layers`."""

    def __init__(self, layers: Seq[int]) -> None:
        self.layers = tuple(layers)
        self.features: torch.Tensor | None = None

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """Called by a model with the hidden states that enter `layer`, (rows, hidden_size); copies them if wanted."""
        for index, wanted in enumerate(self.layers):
            if wanted == layer:
                rows, size = hidden.shape
                if self.features is None or len(self.features) != rows:
                    self.features = hidden.new_empty(rows, len(self.layers) * size)
                self.features[:, index * size : (index + 1) * size] = hidden


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Rows [first, stop) of a pass's `features`, (rows, size), sliced only when they are read, since most never are."""

    features: torch.Tensor
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def behind(self, count: int) -> FeatureRows:
        """The same without the first `count` rows."""
        return FeatureRows(self.features, self.first + count, self.stop)

    def read(self) -> torch.Tensor:
        """A view of the rows, (len(self), size)."""
        return self.features[self.first : self.stop]
