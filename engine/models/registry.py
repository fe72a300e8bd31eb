"""The families of models that the engine knows. A new one is a file beside this one and an entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from pilotfish.engine.models import gemma3, llama
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.weights.tensors import Tensor, by_name
from pilotfish.errors import ModelError

FAMILIES: list[Family] = [llama.FAMILY, gemma3.FAMILY]


def family_of(architecture: str) -> Family:
    """The family of a ModelConfig's `architecture`. Raises ModelError for one that is not known."""
    for family in FAMILIES:
        if architecture in (*family.model_types, *family.gguf_architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ModelError(f"the architecture is {architecture!r}, but the engine has {known}")


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a model by its name, in the order of the computation. A tied head is not among them."""
    return by_name(family_of(config.architecture).tensors(config))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, in the order of the computation. A tied head is not among them."""
    return {name: tensor.shape for name, tensor in tensors_of(config).items()}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model; a tied head counts once."""
    return count(tensors_of(config).values())


def count(tensors: Iterable[Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)
