"""Family: everything that the engine knows of a family of models, which one file beside this one declares.

A family's file imports no torch until it makes a layer: the planner and the server's process read declarations, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.readers import gguf_config
from pilotfish.engine.weights.tensors import Part, Tensor

if TYPE_CHECKING:
    import torch

    from pilotfish.engine.layers.attention.backend import AttentionParams
    from pilotfish.engine.layers.decoder import DecoderLayer
    from pilotfish.engine.models.weight_store import LayerWeights

_ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Rotary frequencies in old checkpoints, which follow from the configuration."""


def declared_name(stored: str) -> str | None:
    """The declared name of a tensor of a Hugging Face folder, or None for one that is not used."""
    return None if _ROTARY_BUFFER.fullmatch(stored) else stored


ReadFolder = Callable[
    [Path, "Mapping[str, Tensor]", "torch.dtype", "Mapping[str, Part]", "torch.device"],
    "Iterator[tuple[str, torch.Tensor]]",
]
"""Takes a folder, the declared tensors, a dtype, the parts to read, and a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of a family, the readers of its files, its tensors, and its layer."""

    models: str
    """The published models that it has, as people call them."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    gguf_architectures: tuple[str, ...]
    """Values of `general.architecture` in GGUF files."""
    read_hf: Callable[[Values], ModelConfig]
    """Reads config.json. Raises ModelError for a model that the engine does not know. Fields that the file leaves
    out have the defaults of transformers' configuration classes."""
    read_gguf: Callable[[Header], ModelConfig] = gguf_config
    """Reads a GGUF file's header. Raises ModelError, too."""
    read_folder: ReadFolder | None = None
    """Reads the tensors of a Hugging Face folder, as `engine.models.checkpoint.iter_weights` does; None: they are
    stored as they are declared."""
    own_quantization: tuple[str, ...] = ()
    """Values of `quant_method` that `read_folder` dequantizes."""
    tensors: Callable[[ModelConfig], Iterable[Tensor]]
    """Declares every tensor of a model, in the order of the computation; a tied head is not among them."""
    declared_name: Callable[[str], str | None] = declared_name
    """The declared name of a tensor of a Hugging Face folder, or None for one that is not used."""
    layer: Callable[[LayerWeights, ModelConfig, AttentionParams, torch.Tensor], DecoderLayer]
    """Makes a layer from its weights, the model's config, the layer's attention and its table of `cos_sin_table`."""
    scaled_embedding: bool = False
    """Whether token embeddings are multiplied by sqrt(hidden_size)."""
    cpu: str = "fused"
    """How the CPU's native kernels compute its layers: "fused", in one call, or else what stands in the way."""
    run: tuple[str, ...] = ()
    """Published models that the tests run; of all families they run tiny random ones."""
