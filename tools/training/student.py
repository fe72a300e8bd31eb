"""Student: the interface of a draft in training; Teacher: the target's weights that it learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from pilotfish.tools.training.batches import Batch
from pilotfish.tools.training.settings import Objective


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's weights that training reads."""

    embedding: torch.Tensor  # (vocab_size, hidden_size) float32
    head: torch.Tensor  # (draft_vocab_size, hidden_size) float32: its rows for the draft's tokens
    norm: torch.Tensor  # (hidden_size,) float32: what the final norm multiplies by
    eps: float
    target_ids: torch.Tensor  # (draft_vocab_size,) int64, ascending

    def distribution(self, final: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """Return p over the draft's vocabulary, (rows, draft_vocab_size), of rows of Batch.final and
        Batch.normalizer."""
        logits = F.linear(F.rms_norm(final, self.norm.shape, self.norm, self.eps), self.head)
        return (logits.float() - normalizer.unsqueeze(1)).exp()


@dataclass(slots=True)
class Tally:
    """Counts of greedy acceptance: `reached[j]` anchors had their first j tokens right, and `right[j]` of them the next
    one, too."""

    reached: list[int]
    right: list[int]

    @classmethod
    def empty(cls, steps: int) -> Tally:
        return cls([0] * steps, [0] * steps)

    def add(self, correct: torch.Tensor) -> None:
        """Count anchors. correct: (steps, anchors) bool, whether each drafted token is right."""
        alive = torch.ones(correct.shape[1], dtype=torch.bool)
        for step, now in enumerate(correct):
            self.reached[step] += int(alive.sum())
            alive = alive & now
            self.right[step] += int(alive.sum())

    def rates(self) -> list[float]:
        """Return the acceptance at each position, given that those before it were accepted."""
        return [right / max(1, reached) for right, reached in zip(self.right, self.reached, strict=True)]

    def accepted_length(self) -> float:
        """Return the mean tokens of a step that drafts that many: the accepted ones and the target's own."""
        return 1.0 + sum(self.right) / max(1, self.reached[0])


class Student(Protocol):
    steps: int
    """Drafted tokens that it is trained on."""

    def loss(self, batch: Batch, objective: Objective) -> torch.Tensor: ...

    def tally(self, batch: Batch, tally: Tally) -> None:
        """Count acceptance on a batch."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...

    def export(self, folder: Path, trained: dict[str, Any]) -> None:
        """Write the draft for serving: safetensors, and a config.json in which `trained` describes the training."""
        ...
