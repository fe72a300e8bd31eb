"""The communication of a sharded model's ranks during a pass. `engine.ranks` has the processes and their links."""

from __future__ import annotations

from typing import Protocol

import torch


class Communicator(Protocol):
    """Collective operations: all ranks call the same methods in the same order, with tensors of the same shapes."""

    @property
    def rank(self) -> int:
        """From 0 to size - 1; rank 0 plans, samples and drafts."""
        ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of x over the ranks, the same bits on each of them; x may be overwritten.

        On the CPU it is batch-invariant: a row's sum does not depend on the rows beside it.
        """
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return all ranks' parts, (rows, size of a part) each, side by side in rank order, on rank 0. Other ranks must
        not read the result."""
        ...


class Alone:
    """The communicator of a model that is not sharded: one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


ALONE = Alone()
