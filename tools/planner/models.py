"""PlannedModel: a model's shape with the dtypes it would have, and what of it lies on one tensor-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pilotfish.checkpoints.catalog import CATALOG, ModelFiles, resolve
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout, num_kv_heads
from pilotfish.engine.weights import read_config
from pilotfish.engine.weights.hf_quantization import is_quantizable
from pilotfish.engine.weights.names import expected_shapes, shape_of
from pilotfish.errors import ModelError
from pilotfish.tools.planner.published import Published, find

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
"""Of one number."""
SCALE_BYTES = 4
"""An fp8 or int8 matrix has a float32 scale for each output channel."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """What one rank has of a weight matrix that is multiplied by: (outputs, inputs)."""

    name: str
    outputs: int
    inputs: int
    dtype: str

    @property
    def params(self) -> int:
        return self.outputs * self.inputs

    @property
    def bytes(self) -> int:
        return self.params * BYTES[self.dtype] + (self.outputs * SCALE_BYTES if self.dtype in ("fp8", "int8") else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    name: str
    shape: ModelConfig
    dtype: str
    """Of activations, and of the weights that are not in fp8: "float32", "bfloat16" or "float16"."""
    kv_dtype: str
    """Those, or "fp8"."""
    fp8_except: tuple[str, ...] | None = None
    """As in `Published`."""

    @property
    def logit_size(self) -> int:
        return self.shape.vocab_size

    @property
    def params(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return sum(prod(shape) for shape in expected_shapes(self.shape).values())

    def dtype_of(self, name: str) -> str:
        """Of the weight of that name."""
        in_fp8 = self.fp8_except is not None and is_quantizable(name, self.fp8_except)
        return "fp8" if in_fp8 else self.dtype

    def matrices(self, ranks: int = 1) -> Iterator[Matrix]:
        """One rank's, in the order of the computation: the layers', then the head (tied or not)."""
        for name, shape in rank_shapes(self.shape, ranks).items():
            if is_quantizable(name):
                yield Matrix(name, shape[0], shape[1], self.dtype_of(name))
        yield Matrix("lm_head.weight", Layout(self.shape, 0, ranks).vocab_part, self.shape.hidden_size, self.dtype)

    def weight_bytes(self, ranks: int = 1) -> int:
        """Bytes of weights on one of `ranks` tensor-parallel ranks."""
        total = 0
        for name, shape in rank_shapes(self.shape, ranks).items():
            dtype = self.dtype_of(name)
            total += prod(shape) * BYTES[dtype] + (shape[0] * SCALE_BYTES if dtype == "fp8" else 0)
        return total

    def kv_bytes_per_token(self, ranks: int = 1) -> int:
        """Keys and values of a token, all layers, on one rank."""
        shape = self.shape
        return 2 * shape.num_layers * num_kv_heads(shape, ranks) * shape.head_dim * BYTES[self.kv_dtype]

    def seen(self, context: int) -> float:
        """Keys that a query at the end of `context` tokens sees, the mean over the layers."""
        shape = self.shape
        if shape.sliding_window is None:
            return float(context)
        sliding = sum(shape.sliding_layers) if shape.sliding_layers else shape.num_layers
        near = min(context, shape.sliding_window)
        return (sliding * near + (shape.num_layers - sliding) * context) / shape.num_layers


def rank_shapes(shape: ModelConfig, ranks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one rank's part of each tensor: the first rank's, which also has the biases that are added to a sum.

    Raises ConfigError, a ValueError, if something does not divide.
    """
    return {name: shape_of(part) for name, part in Layout(shape, 0, ranks).parts().items()}


def read_shape(model: str) -> Published:
    """The shape of a model named as `pilotfish serve` takes it: from `published` if it is there, else from its files.

    A hub's name that is not published here is looked for in the local cache only: planning downloads nothing. Raises
    ModelError.
    """
    files = locate(model)
    if files is None:
        published = find(model)
        assert published is not None
        return published
    shape = read_config(files)
    quantization = shape.fp8
    return Published(shape, None if quantization is None else tuple(quantization.unquantized))


def locate(model: str) -> ModelFiles | None:
    """The files of a model, of a hub's name those in the local cache; None for one whose shape is published here.
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
