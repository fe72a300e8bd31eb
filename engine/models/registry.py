"""The families of models that the engine knows. A new one is a file beside this one and an entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, Literal

from pilotfish.engine.models import (
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral3,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2_moe,
    qwen3_moe,
    smollm3,
)
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family
from pilotfish.engine.weights.tensors import Tensor, by_name
from pilotfish.errors import ModelError

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    gemma3.FAMILY,
    gemma2.FAMILY,
    granite.FAMILY,
    mistral3.FAMILY,
    olmo2.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    gpt_oss.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
)

NamedBy = Literal["model_types", "gguf_architectures"]


def find_family(name: Any, what: str, *named_by: NamedBy) -> Family:
    """The family that has `name` among its names of these kinds. Raises ModelError, which calls the name `what`."""
    for family in FAMILIES:
        if any(name in getattr(family, kind) for kind in named_by):
            return family
    known = dict.fromkeys(each for family in FAMILIES for kind in named_by for each in getattr(family, kind))
    raise ModelError(f"{what} is {name!r:.200}, but the engine knows {', '.join(known)}")


def is_known(model_type: Any) -> bool:
    """Whether a family has this model_type."""
    return any(model_type in family.model_types for family in FAMILIES)


def family_of(architecture: str) -> Family:
    """The family of a ModelConfig's `architecture`. Raises ModelError for one that is not known."""
    return find_family(architecture, "the architecture", "model_types", "gguf_architectures")


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a model by its name, in the order of the computation. A tied head is not among them."""
    return by_name(family_of(config.architecture).tensors(config))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, in the order of the computation. A tied head is not among them."""
    return {name: tensor.shape for name, tensor in tensors_of(config).items()}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model; a tied head counts once."""
    if config.parameters:
        return config.parameters
    return count(tensors_of(config).values())


def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token is computed with: of a mixture, those of the experts that it takes."""
    total = parameter_count(config)
    if config.experts is None or config.parameters:
        return total
    experts = count(tensor for tensor in tensors_of(config).values() if tensor.expert is not None)
    return total - experts + experts * config.experts.per_token // config.experts.count


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in these tensors."""
    return sum(prod(tensor.shape) for tensor in tensors)
