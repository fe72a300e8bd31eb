"""Tensor: what a model family declares of each of its tensors; and parts of tensors. No torch.

A declaration says everything that reading, sharding, quantizing and planning need to know of a tensor. Families make
theirs with the vocabulary of `engine.models.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pilotfish.errors import ModelError

Part = tuple[slice, ...]
"""A contiguous part of a tensor: for each of its dimensions a range, with start and stop."""

Axis = Literal["heads", "head", "kv_heads", "inner", "expert", "shared", "vocabulary"]
"""What a sharded dimension runs over: query heads and key-value heads (`head_dim` entries each), query heads with an
entry each ("head"), the MLP's inner size, an expert's, a shared expert's, or the vocabulary. `engine.models.layout`
says which of them each rank has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    """Shape of the whole tensor: (size,) or (out_features, in_features)."""
    gguf: str
    """GGUF's name."""
    axes: tuple[Axis | None, ...]
    """What each dimension is sharded by over tensor-parallel ranks; None: it is not sharded."""
    linear: str | None = None
    """The prepared matrix that it becomes a part of, by its module path: tensors with the same path are fused, their
    rows in the order of their declaration. None: a norm."""
    expert: int | None = None
    """The number of the expert that it belongs to."""
    first_rank_only: bool = False
    """Only rank 0 has it: a bias that is added to a sum over the ranks."""
    quantizable: bool = False
    """Quantization may take it: it is a matrix of a layer."""
    norm_offset: float = 0.0
    """A norm multiplies by this plus its weight. GGUF files hold the sum."""
    paired_rows: int = 0
    """Rows of a head that GGUF files hold in the order (x0, y0, x1, y1, ...), the pairs that are rotated together,
    where Hugging Face has (x0, x1, ..., y0, y1, ...); 0: both have the same order."""
    turned: tuple[int, int] | None = None
    """The size of a head, and how many of its dimensions are rotated, if these are not all: rows of a head are laid out
    as `engine.models.rope.rotated_first` orders them. None: all are rotated, or none."""
    stored: str = ""
    """The name of the stored tensor that it is a part of: those of one tensor are its rows, in the order of their
    declaration. "": it is stored by itself."""
    gguf_stored: str = ""
    """The same in GGUF files."""

    @property
    def module(self) -> str:
        """The name without its last component, "weight" or "bias"."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """The last component of the name: "weight" or "bias"."""
        return self.name.rpartition(".")[2]


def whole(shape: tuple[int, ...]) -> Part:
    """The part that is the entire tensor."""
    return tuple(slice(0, size) for size in shape)


def whole_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    return {name: whole(tensor.shape) for name, tensor in tensors.items()}


def shape_of(part: Part) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in part)


def rows_of(tensors: Iterable[Tensor], whole: Callable[[Tensor], str]) -> dict[str, list[tuple[Tensor, slice]]]:
    """The parts of each stored tensor that is declared in parts, with their rows; `whole` gives a part's stored name,
    or "" for a tensor that is stored by itself."""
    parts: dict[str, list[tuple[Tensor, slice]]] = {}
    for tensor in tensors:
        if name := whole(tensor):
            together = parts.setdefault(name, [])
            start = together[-1][1].stop if together else 0
            together.append((tensor, slice(start, start + tensor.shape[0])))
    return parts


def by_name(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}


def check_names(where: object, found: Collection[str], expected: Collection[str]) -> None:
    """Raise ModelError unless the tensors `found` in `where` are those `expected`."""
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{where} lacks {_listed(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ModelError(f"{where} has {_listed(sorted(unknown))}, which a model of this configuration does not have")


def check_shape(where: object, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ModelError unless the tensor has the shape that the configuration gives it."""
    if found != wanted:
        raise ModelError(f"{where}: tensor {name!r} has shape {found}, but the configuration makes it {wanted}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{rest}"
