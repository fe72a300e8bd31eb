"""What the ranks of a model say to each other in a pass. The processes themselves are `engine.ranks.lead`'s."""

from __future__ import annotations

from typing import Protocol

import torch


class Communicator(Protocol):
    """All ranks call the same methods in the same order, with tensors of the same shapes."""

    @property
    def rank(self) -> int:
        """0 to size - 1; 0 is the one that plans, samples and drafts."""
        ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, the same bits on each of them; x may be overwritten.

        On the CPU a row's sum does not depend on the rows beside it.
        """
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The parts (rows, size of a part) of all ranks side by side, in the order of ranks, on rank 0; what it returns
        elsewhere is not to be read."""
        ...


class Alone:
    """The one rank of a model that is not divided."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


ALONE = Alone()
