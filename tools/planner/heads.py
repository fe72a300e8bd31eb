"""PlannedHead: an EAGLE-3 head (arXiv 2503.01840) beside its target: one layer, on the first GPU alone.

It has the interface of `PlannedModel` as far as the planner uses it, the fusion of the target's features, which is
computed once for each of the target's rows, a vocabulary of its own, and matrices that it may share with the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.checkpoints.huggingface import is_eagle3
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.models.eagle3_checkpoint import (
    declared_name,
    optional,
    read_config,
    tensors_of,
)
from pilotfish.engine.models.head_files import EMBEDDING, FUSION, SAFETENSORS
from pilotfish.engine.models.registry import count
from pilotfish.engine.weights.quantization import SCHEMES
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.tools.planner.models import Matrix, PlannedModel, kv_bytes, locate, matrix_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedHead:
    name: str
    config: Eagle3Config
    dtype: str
    """The dtype of activations, and of weights that are not quantized."""
    kv_dtype: str
    shared: tuple[str, ...]
    """Which of EMBEDDING and HEAD it takes from its target."""
    quantized: tuple[tuple[str, str], ...] = ()
    """The names of tensors that stay quantized, with their schemes."""

    @property
    def shape(self) -> ModelConfig:
        return self.config.decoder

    @property
    def logit_size(self) -> int:
        return self.config.draft_vocab_size

    @property
    def params(self) -> int:
        """Parameters of its own tensors."""
        return count(tensor for tensor in self._tensors() if tensor.name not in self.shared)

    @property
    def fusion(self) -> Matrix:
        return self._matrix(tensors_of(self.config)[FUSION])

    def dtype_of(self, name: str) -> str:
        return dict(self.quantized).get(name, self.dtype)

    def matrices(self, ranks: int = 1) -> Iterator[Matrix]:
        """Yield the matrices of a pass of the layer, then the head; all are on the first GPU, whatever `ranks` is."""
        for tensor in self._tensors():
            if tensor.linear is not None and tensor.kind == "weight" and tensor.name not in (EMBEDDING, FUSION):
                yield self._matrix(tensor)

    def weight_bytes(self, target: PlannedModel, ranks: int) -> int:
        """Return its bytes on the first GPU, with its own copies of shared matrices where the target's are sharded over
        several `ranks`."""
        total = 0
        for tensor in self._tensors():
            rows, columns = tensor.shape[0], prod(tensor.shape[1:])
            if tensor.name not in self.shared:
                total += matrix_bytes(rows, columns, self.dtype_of(tensor.name))
            elif ranks > 1:
                total += matrix_bytes(rows, columns, target.dtype)
        return total

    def _tensors(self) -> Iterable[Tensor]:
        return tensors_of(self.config).values()

    def _matrix(self, tensor: Tensor) -> Matrix:
        return Matrix(tensor.name, tensor.shape[0], tensor.shape[1], self.dtype_of(tensor.name))

    def kv_bytes_per_token(self, ranks: int = 1) -> int:
        """Return the bytes of keys and values of its layer, on the first GPU."""
        return kv_bytes(self.shape.num_kv_heads, self.shape.head_dim, self.kv_dtype)

    def seen(self, context: int) -> float:
        return float(context)


def find_head(model: str) -> ModelFiles | None:
    """Return the files of an EAGLE-3 head, named as `pilotfish serve` takes it; None for a model of another kind.
    Raises ModelError."""
    files = locate(model)
    return files if files is not None and files.format == "huggingface" and is_eagle3(files.path) else None


def read_head(files: ModelFiles, name: str, dtype: str, kv_dtype: str, notes: list[str]) -> PlannedHead:
    """Read a head. notes: assumptions are added, where only config.json is available. Raises ModelError."""
    config = read_config(files.path)
    shared = optional(config)
    stored = _stored(files.path / SAFETENSORS)
    if stored is None:
        notes.append(f"{name}: its weights are not available: planned with its target's embedding")
        shared, stored = {EMBEDDING}, {}
    kinds = {scheme.safetensors: scheme for scheme in SCHEMES.values() if dtype in scheme.dtypes}
    quantized = tuple(sorted((tensor, kinds[kind].name) for tensor, kind in stored.items() if kind in kinds))
    shared -= stored.keys()
    return PlannedHead(
        name=name, config=config, dtype=dtype, kv_dtype=kv_dtype, shared=tuple(sorted(shared)), quantized=quantized
    )


def _stored(path: Path) -> dict[str, str] | None:
    """Return the tensors of a file by name, with their dtypes as safetensors calls them; None if it is not there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        return {declared_name(name): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
