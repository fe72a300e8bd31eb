"""Which class computes which architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderFamily, DecoderModel
from pilotfish.engine.models.gemma3 import GEMMA3
from pilotfish.engine.models.llama import LLAMA
from pilotfish.engine.models.model import Model
from pilotfish.errors import ModelError


class ModelClass(Protocol):
    """Makes a rank's part of a model, of the whole model's shape and the part's weights, which are consumed one by one;
    positions go up to `max_positions`.

    Raises ModelError if `weights` lack a tensor, ConfigError for a shape that does not divide over the ranks.
    """

    def __call__(
        self,
        config: ModelConfig,
        kernels: Kernels[Any],
        attention: AttentionBackend,
        weights: Iterable[tuple[str, torch.Tensor]],
        max_positions: int,
        device: torch.device,
        comm: Communicator = ALONE,
    ) -> Model: ...


MODELS: Mapping[str, DecoderFamily] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3": GEMMA3,
}


def model_class(architecture: str) -> ModelClass:
    """The class for a ModelConfig's `architecture`. Raises ModelError for one that is not known."""
    if architecture not in MODELS:
        raise ModelError(f"the architecture is {architecture!r}, but the engine has {', '.join(MODELS)}")
    return partial(DecoderModel, MODELS[architecture])
