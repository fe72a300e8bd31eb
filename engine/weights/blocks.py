"""Matrices in the quantized blocks of a GGUF file, as they are stored. No torch until there are rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

if TYPE_CHECKING:
    import torch

KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
"""The kinds that kernels compute with."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of which each row is a sequence of blocks of one kind (ggml-common.h in
    https://github.com/ggml-org/ggml)."""

    name: str
    """The stored tensor's name, for errors."""
    kind: Kind
    rows: torch.Tensor
    """(rows, bytes of a row) uint8."""

    @property
    def shape(self) -> tuple[int, int]:
        values, size = GGML_QUANT_SIZES[self.kind]
        return len(self.rows), self.rows.shape[1] // size * values

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Blocks:
        """The same with other rows: `change` may reorder or select them, or add rows of zeros, which mean zeros."""
        return replace(self, rows=change(self.rows))


def joined(parts: Sequence[torch.Tensor | Blocks], panel: int) -> list[torch.Tensor | Blocks]:
    """The parts of a matrix, rows one after the other, as few as can be: neighbours of one kind are joined where the
    rows before them are a multiple of `panel`."""
    import torch

    found: list[torch.Tensor | Blocks] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, Blocks) and isinstance(before, Blocks) and _joins(before, part, panel):
            found[-1] = replace(before, rows=torch.cat((before.rows, part.rows)))
        else:
            found.append(part)
    return found


def _joins(before: Blocks, part: Blocks, panel: int) -> bool:
    return before.kind == part.kind and before.shape[0] % panel == 0
