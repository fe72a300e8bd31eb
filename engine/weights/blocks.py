"""Matrices in the quantized blocks of a GGUF file, as they are stored. No torch until there are rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from pilotfish.engine.weights.quantization import Quantization
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_ALL = Quantization("")

KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
"""The kinds that kernels compute with."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The forms that matrices have in memory, where kernels compute with these, beside the dtype of all else."""

    blocks: bool = False
    """Those in quantized blocks of `KINDS` stay in them."""
    halves: bool = False
    """Those in float16 or bfloat16 stay in it."""
    layers: Kind | None = None
    """What the other matrices of layers are quantized to; None: they are not."""
    vocabulary: Kind | None = None
    """The same for embedding and head."""

    def kind_of(self, tensor: Tensor, left: Quantization | None = None) -> Kind | None:
        """What a plain tensor is quantized to; None: it is not."""
        if tensor.linear is None or tensor.kind != "weight":
            return None
        if tensor.axes[0] == "vocabulary":
            return self.vocabulary
        return self.layers if (left or _ALL).takes(tensor) else None


PLAIN = Storage()

QUANTIZED_TO: Mapping[str, tuple[Kind, Kind]] = {"int8": (Kind.Q8_0, Kind.Q8_0), "int4": (Kind.Q4_1, Kind.Q8_0)}
"""What matrices of layers, and embedding and head, are quantized to at load time, by the setting `quantization`. Groups
are of 32 weights, int4's with a scale and a minimum."""


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


def in_blocks(
    weights: Iterable[tuple[str, torch.Tensor | Blocks]],
    tensors: Mapping[str, Tensor],
    storage: Storage,
    left: Quantization | None,
    quantize: Callable[[str, torch.Tensor, Kind], Blocks],
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    """The same weights with their plain matrices quantized as `storage` says, each as it is taken. Routers of experts
    stay as they are, and so do modules that `left` does not take, and rows that are not whole blocks."""
    odd = []
    for name, tensor in weights:
        kind = storage.kind_of(tensors[name], left) if name in tensors else None
        if kind is None or isinstance(tensor, Blocks):
            yield name, tensor
        elif tensor.shape[1] % GGML_QUANT_SIZES[kind][0]:
            odd.append(name)
            yield name, tensor
        else:
            yield name, quantize(name, tensor, kind)
    if odd:
        logger.warning(
            "%d matrices are not quantized, such as %s: the length of their rows is not a multiple of 32",
            len(odd),
            odd[0],
        )


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
