"""PlannedModel: a model's shape and dtypes, and its part on one tensor-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from pilotfish.checkpoints.catalog import CATALOG, ModelFiles, resolve
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout, num_kv_heads
from pilotfish.engine.models.registry import parameter_count, tensors_of
from pilotfish.engine.models.tensors import EMBEDDING, HEAD
from pilotfish.engine.weights.blocks import PLAIN, Storage
from pilotfish.engine.weights.quantization import SCHEMES, Quantization
from pilotfish.engine.weights.tensors import Tensor, shape_of
from pilotfish.errors import ModelError
from pilotfish.tools.planner.published import find

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, **{scheme.name: scheme.bytes for scheme in SCHEMES.values()}}
"""Bytes of one number, by its dtype or its scheme of quantization."""

KV_SCALE_BYTES = 4
"""Of each token and head, in a KV cache in int8."""


def kv_bytes(heads: int, head_dim: int, dtype: str) -> int:
    """Return the bytes of a token's keys and values of so many heads, in one layer."""
    return 2 * heads * (head_dim * BYTES[dtype] + (KV_SCALE_BYTES if dtype == "int8" else 0))


def matrix_bytes(rows: int, columns: int, dtype: str) -> int:
    """Return the bytes of a matrix in a dtype, a scheme of quantization or a kind of blocks, scales included."""
    if dtype in Kind.__members__:
        block, size = GGML_QUANT_SIZES[Kind[dtype]]
        return rows * columns // block * size
    scheme = SCHEMES.get(dtype)
    return rows * columns * BYTES[dtype] if scheme is None else scheme.size_bytes(rows, columns)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One rank's part of a weight matrix that is multiplied with: (outputs, inputs)."""

    name: str
    outputs: int
    inputs: int
    dtype: str
    share: float = 1.0
    """The part of a token's passes that multiply with it: less than 1 for an expert's."""

    @property
    def params(self) -> int:
        return self.outputs * self.inputs

    @property
    def bytes(self) -> int:
        return matrix_bytes(self.outputs, self.inputs, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    name: str
    shape: ModelConfig
    dtype: str
    """The dtype of activations and of weights that are not quantized: "float32", "bfloat16" or "float16"."""
    kv_dtype: str
    """The dtype of the KV cache: one of those, or "fp8"."""
    quantization: Quantization | None = None
    """The quantization that its matrices would have, whatever its checkpoint has."""
    storage: Storage = PLAIN
    """The blocks that they are quantized to instead, on a CPU."""

    @property
    def logit_size(self) -> int:
        return self.shape.vocab_size

    @property
    def params(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return parameter_count(self.shape)

    def dtype_of(self, tensor: Tensor) -> str:
        """Return the dtype, the scheme of quantization or the kind of blocks that a tensor would have."""
        kind = self.storage.kind_of(tensor, self.quantization)
        if kind is not None and tensor.shape[1] % GGML_QUANT_SIZES[kind][0] == 0:
            return kind.name
        quantization = self.quantization
        return quantization.scheme if quantization is not None and quantization.takes(tensor) else self.dtype

    def matrices(self, ranks: int = 1) -> Iterator[Matrix]:
        """Yield one rank's matrices in the order of the computation: the layers', then the head (tied or not)."""
        tensors = tensors_of(self.shape)
        for name, shape in rank_shapes(self.shape, ranks).items():
            if tensors[name].quantizable:
                experts = self.shape.experts if tensors[name].expert is not None else None
                share = 1.0 if experts is None else experts.per_token / experts.count
                yield Matrix(name, shape[0], shape[1], self.dtype_of(tensors[name]), share)
        head = self.dtype_of(tensors[EMBEDDING if self.shape.tie_embeddings else HEAD])
        yield Matrix(HEAD, Layout(self.shape, 0, ranks).vocab_part, self.shape.hidden_size, head)

    def weight_bytes(self, ranks: int = 1) -> int:
        """Return the bytes of weights on one of `ranks` tensor-parallel ranks."""
        tensors, shapes = tensors_of(self.shape), rank_shapes(self.shape, ranks)
        return sum(
            matrix_bytes(shape[0], prod(shape[1:]), self.dtype_of(tensors[name])) for name, shape in shapes.items()
        )

    def kv_bytes_per_token(self, ranks: int = 1) -> int:
        """Return the bytes of a token's keys and values, all layers, on one rank."""
        shape = self.shape
        return shape.num_layers * kv_bytes(num_kv_heads(shape, ranks), shape.head_dim, self.kv_dtype)

    def seen(self, context: int) -> float:
        """Return the keys that a query at the end of `context` tokens sees, the mean over the layers."""
        shape = self.shape
        if shape.sliding_window is None:
            return float(context)
        sliding = sum(shape.sliding_layers) if shape.sliding_layers else shape.num_layers
        near = min(context, shape.sliding_window)
        return (sliding * near + (shape.num_layers - sliding) * context) / shape.num_layers


def rank_shapes(shape: ModelConfig, ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of rank 0's part of each tensor; it alone has the biases that are added to a sum.

    Raises ConfigError, a ValueError, if something does not divide.
    """
    return {name: shape_of(part) for name, part in Layout(shape, 0, ranks).parts().items()}


def read_shape(model: str) -> ModelConfig:
    """Read the shape of a model named as `pilotfish serve` takes it: from `published` if it is there, else from its
    files. Planning downloads nothing: other hub names are looked up in the local cache only. Raises ModelError.
    """
    files = locate(model)
    if files is not None:
        return read_config(files)
    published = find(model)
    assert published is not None
    return published


def locate(model: str) -> ModelFiles | None:
    """Find the files of a model, for a hub name in the local cache; None for a model whose shape is published here.
    Raises ModelError."""
    if not Path(model).expanduser().exists() and find(model) is not None:
        return None
    return _cached(model) if _is_hub_name(model) else resolve(model)


def _is_hub_name(model: str) -> bool:
    named = any(entry.name == model for entry in CATALOG)
    return not named and not Path(model).expanduser().exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def _cached(model: str) -> ModelFiles:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        raise ModelError(
            f"the shape of {model!r} is not known here and its config.json is not in the Hugging Face cache: give a "
            "folder that has it, or fetch it once with `hf download " + model + " config.json`"
        )
    return ModelFiles(model, "huggingface", Path(config).parent)
