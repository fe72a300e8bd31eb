"""PlannedHead: an EAGLE-3 head (arXiv 2503.01840) beside its target: one layer, on the first GPU alone.

It has what the planner asks of a `PlannedModel`, and three things more: the fusion of the target's features, which is
computed once for each row of the target's, a vocabulary of its own, and matrices that it may share with the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.weights.eagle3_config import SAFETENSORS, expected_shapes, plain_name, read_config
from pilotfish.engine.weights.hf_config import is_eagle3
from pilotfish.tools.planner.models import BYTES, SCALE_BYTES, Matrix, PlannedModel, locate

EMBEDDING, HEAD, FUSION = "embed_tokens.weight", "lm_head.weight", "fc.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedHead:
    name: str
    config: Eagle3Config
    dtype: str
    """Of activations, and of the weights that are not in int8."""
    kv_dtype: str
    shared: tuple[str, ...]
    """Of EMBEDDING and HEAD, those that it takes from its target."""
    int8: tuple[str, ...] = ()
    """The tensors that stay in int8, with a scale for each row."""

    @property
    def shape(self) -> ModelConfig:
        return self.config.decoder

    @property
    def logit_size(self) -> int:
        return self.config.draft_vocab_size

    @property
    def params(self) -> int:
        """Those of its own."""
        return sum(prod(shape) for name, shape in expected_shapes(self.config).items() if name not in self.shared)

    @property
    def fusion(self) -> Matrix:
        outputs, inputs = expected_shapes(self.config)[FUSION]
        return Matrix(FUSION, outputs, inputs, self.dtype_of(FUSION))

    def dtype_of(self, name: str) -> str:
        return "int8" if name in self.int8 else self.dtype

    def matrices(self, ranks: int = 1) -> Iterator[Matrix]:
        """Of a pass of the layer, then the head; the first GPU's, whatever `ranks` says."""
        for name, shape in expected_shapes(self.config).items():
            if len(shape) == 2 and name not in (EMBEDDING, FUSION):
                yield Matrix(name, shape[0], shape[1], self.dtype_of(name))

    def weight_bytes(self, target: PlannedModel, ranks: int) -> int:
        """On the first GPU. A target over several `ranks` has no whole embedding or head there to share: they come
        on top."""
        total = 0
        for name, shape in expected_shapes(self.config).items():
            if name in self.shared:
                total += prod(shape) * BYTES[target.dtype] * (ranks > 1)
            else:
                dtype = self.dtype_of(name)
                total += prod(shape) * BYTES[dtype] + (shape[0] * SCALE_BYTES if dtype == "int8" else 0)
        return total

    def kv_bytes_per_token(self, ranks: int = 1) -> int:
        """Keys and values of its layer, on the first GPU."""
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * BYTES[self.kv_dtype]

    def seen(self, context: int) -> float:
        return float(context)


def find_head(model: str) -> ModelFiles | None:
    """The files of an EAGLE-3 head, named as `pilotfish serve` takes it; None for a model of another kind. Raises
    ModelError."""
    files = locate(model)
    return files if files is not None and files.format == "huggingface" and is_eagle3(files.path) else None


def read_head(files: ModelFiles, name: str, dtype: str, kv_dtype: str, notes: list[str]) -> PlannedHead:
    """`notes`: told what is assumed where config.json is all that there is. Raises ModelError."""
    config = read_config(files.path)
    optional = {EMBEDDING, *([HEAD] if config.draft_vocab_size == config.decoder.vocab_size else [])}
    stored = _stored(files.path / SAFETENSORS)
    if stored is None:
        notes.append(f"{name}: its weights are not here to be looked at: planned with its target's embedding")
        optional = {EMBEDDING}
        stored = {}
    int8 = tuple(sorted(tensor for tensor, kind in stored.items() if kind == "I8")) if dtype == "float32" else ()
    shared = tuple(sorted(optional - stored.keys()))
    return PlannedHead(name=name, config=config, dtype=dtype, kv_dtype=kv_dtype, shared=shared, int8=int8)


def _stored(path: Path) -> dict[str, str] | None:
    """The tensors of a file by name, with their dtypes as safetensors calls them; None if it is not there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        return {plain_name(name): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
