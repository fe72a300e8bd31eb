"""FeatureBacklog: of one sequence, what a drafter that reads the target's features has in its KV cache, and the
features that it has not read yet.

Row 0 of the cache is the first position with features: there are none for a prefix from the target's prefix cache,
unless the drafter's own cache has that prefix. Rotary embedding is relative, so it does not matter where a sequence's
rows begin.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.decoder_model import CausalModel, DecoderModel
from pilotfish.engine.models.features import FeatureRows
from pilotfish.errors import ConfigError

MOST_PENDING = 256
"""Maximum positions whose features are kept for a sequence while it is not drafted for: a drafter that reads the
target's features needs little more context."""


@dataclass(slots=True)
class FeatureBacklog:
    blocks: BlockTable
    """The sequence's part of the drafter's KV cache."""
    first: int = 0
    """The position of its first row."""
    computed: int = 0
    """Number of rows in the cache."""
    pending: deque[FeatureRows] = field(default_factory=deque)
    """Features of the positions from `first + computed` on."""
    rows_pending: int = 0

    @property
    def end(self) -> int:
        """The position after the last one with known features."""
        return self.first + self.computed + self.rows_pending

    def observe(self, start: int, features: FeatureRows) -> bool:
        """Add features of the positions from `start` on; return whether any of them are new. After a gap, which the
        target found in its prefix cache, everything before is forgotten."""
        end = start + len(features)
        if start > self.end:
            self.forget(start)
        elif end <= self.end:  # recomputed after a preemption
            return False
        elif start < self.end:
            features = features.behind(self.end - start)
        self.pending.append(features)
        self.rows_pending += len(features)
        return True

    def take(self, count: int) -> list[torch.Tensor]:
        """Remove and return the first `count` pending features, and count their rows as computed."""
        self.computed += count
        self.rows_pending -= count
        taken: list[torch.Tensor] = []
        while count:
            rows = self.pending.popleft()
            if len(rows) > count:
                self.pending.appendleft(rows.behind(count))
            taken.append(rows.read()[:count])
            count -= len(taken[-1])
        return taken

    def drop(self, most: int) -> None:
        """Keep the last `most` pending features, and forget everything before them if there are more."""
        if (excess := self.rows_pending - most) <= 0:
            return
        pending, end = self.pending, self.end
        while len(pending[0]) <= excess:
            excess -= len(pending.popleft())
        if excess:
            pending[0] = pending[0].behind(excess)
        self.forget(end - most)
        self.pending, self.rows_pending = pending, most

    def forget(self, first: int) -> None:
        """Drop what is cached and pending, and start again at position `first`."""
        self.blocks.release()
        self.first, self.computed, self.pending, self.rows_pending = first, 0, deque(), 0


def with_hidden_states(name: str, target: CausalModel) -> DecoderModel:
    """Return the target of a drafter called `name` that reads hidden states. Raises ConfigError if it gives none."""
    if not isinstance(target, DecoderModel):
        raise ConfigError(
            f"drafter {name!r} reads the target's hidden states, which transformers' code does not give: use ngram, "
            "suffix, or a draft model"
        )
    return target
