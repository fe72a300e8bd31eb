"""WeightStore: collects a model's tensors as they are read, and lays out each matrix once its parts are complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.models.rope import rotated_first
from pilotfish.engine.weights.blocks import Blocks
from pilotfish.engine.weights.quantization import SCALE, scheme_of
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.errors import ModelError


class WeightStore:
    """Collects one rank's parts of `tensors`; fuses and lays out the matrices as the tensors declare it.

    padded_rows: matrices with a row per token of the vocabulary are padded to so many with zeros; 0: they are not.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], kernels: Kernels[Any], device: torch.device, padded_rows: int = 0
    ) -> None:
        self._declared, self._kernels, self._device, self._padded_rows = tensors, kernels, device, padded_rows
        self.dtype = torch.get_default_dtype()
        """The dtype of the norms, and so of all plain weights, once one has been added."""
        self._bytes: Counter[str] = Counter()  # of matrices, by form
        self._norms: dict[str, torch.Tensor] = {}
        self._parts: dict[
            str, torch.Tensor | Blocks
        ] = {}  # of matrices and biases, and scales, that are not laid out yet
        self._linears: dict[str, PreparedLinear] = {}
        self._names: dict[str, list[str]] = {}  # of the tensors that each matrix is made of
        for name, tensor in tensors.items():
            if tensor.linear is not None:
                self._names.setdefault(tensor.linear, []).append(name)

    def add(self, name: str, tensor: torch.Tensor | Blocks) -> None:
        """Add a tensor under its declared name, or its scales; in any order."""
        declared = self._declared[name.removesuffix(SCALE)]
        if isinstance(tensor, Blocks):
            self._add(name, tensor.mapped(lambda rows: self._arranged(declared, rows)))
        else:
            self._add(name, self._arranged(declared, tensor.to(self._device)))

    def _arranged(self, declared: Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The rows in the engine's order, with as many as are needed."""
        if declared.turned is not None:
            tensor = _turned(tensor, *declared.turned)
        if declared.linear is not None and declared.axes[0] == "vocabulary" and self._padded_rows:
            tensor = _padded(tensor, self._padded_rows)
        return tensor

    def _add(self, name: str, tensor: torch.Tensor | Blocks) -> None:
        declared = self._declared[name.removesuffix(SCALE)]
        if declared.linear is None:
            assert isinstance(tensor, torch.Tensor)
            self._norms[name], self.dtype = tensor, tensor.dtype
            return
        self._parts[name] = tensor
        if name in self._declared and declared.kind == "weight":
            self._bytes[_form(tensor)] += tensor.rows.nbytes if isinstance(tensor, Blocks) else tensor.nbytes
        names = self._names[declared.linear]
        weights = [each for each in names if self._declared[each].kind == "weight"]
        scales = [each + SCALE for each in weights if each in self._parts and _has_scales(self._parts[each])]
        if not all(each in self._parts for each in (*names, *scales)):
            return
        if scales and len(scales) < len(weights):
            raise ModelError(
                f"of the model's {declared.linear!r} only {', '.join(scales)} are quantized, but not the rest"
            )
        biases = [each for each in names if each not in weights]
        bias = self._joined(biases)
        try:
            if any(isinstance(self._parts[each], Blocks) for each in weights):
                parts = [self._parts.pop(each) for each in weights]
                self._linears[declared.linear] = self._kernels.prepare_blocks(parts, bias)
                return
            weight, scale = self._joined(weights), self._joined(scales)
            assert weight is not None
            self._linears[declared.linear] = self._kernels.prepare_linear(weight, bias, scale)
        except ValueError as error:
            raise ModelError(f"the model's {declared.linear!r} cannot be computed with: {error}") from error

    def _joined(self, names: list[str]) -> torch.Tensor | None:
        parts = [part for name in names if isinstance(part := self._parts.pop(name), torch.Tensor)]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def norm(self, name: str) -> torch.Tensor:
        """The factors of a norm; in float32 if they are a sum, which would lose most of a bfloat16 weight's digits."""
        if name not in self._norms:
            raise ModelError(f"the model's files have no tensor {name!r}")
        offset, weight = self._declared[name].norm_offset, self._norms.pop(name)
        return offset + weight.float() if offset else weight

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the matrices so far, those with the most bytes first: dtypes, and kinds of blocks."""
        return tuple(form for form, _ in self._bytes.most_common())

    def has(self, path: str) -> bool:
        """Whether tensors of this path are declared."""
        return path in self._names

    def linear(self, path: str) -> PreparedLinear:
        """The matrix that the tensors of this path make up."""
        if path not in self._linears:
            there = sorted(name for name in self._parts if self._declared[name.removesuffix(SCALE)].linear == path)
            raise ModelError(
                f"the model's files lack tensors of {path!r}" + (f"; only parts of {there} are there" if there else "")
            )
        return self._linears.pop(path)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer in a WeightStore, by their names within the layer."""

    store: WeightStore
    prefix: str

    def linear(self, name: str) -> PreparedLinear:
        return self.store.linear(self.prefix + name)

    def has(self, name: str) -> bool:
        """Whether the layer has this matrix, on this rank."""
        return self.store.has(self.prefix + name)

    def norm(self, name: str) -> torch.Tensor:
        return self.store.norm(f"{self.prefix}{name}.weight")

    def vector(self, name: str) -> torch.Tensor:
        """A vector that is neither a norm nor a bias."""
        return self.store.norm(self.prefix + name)


def _has_scales(weight: torch.Tensor | Blocks) -> bool:
    """Whether scales follow the weight."""
    return isinstance(weight, torch.Tensor) and scheme_of(weight.dtype) is not None


def _form(matrix: torch.Tensor | Blocks) -> str:
    return matrix.kind.name if isinstance(matrix, Blocks) else str(matrix.dtype).removeprefix("torch.")


def _turned(tensor: torch.Tensor, head_dim: int, rotated: int) -> torch.Tensor:
    """The rows of each head in the order of `rotated_first`."""
    order = rotated_first(head_dim, rotated).to(tensor.device)
    heads = tensor.reshape(-1, head_dim, *tensor.shape[1:])
    return heads[:, order].view(tensor.shape)


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with zeros appended, to `rows` rows."""
    if len(tensor) == rows:
        return tensor
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
