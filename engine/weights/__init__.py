"""Weights: from the files of a model to its shape and its tensors, whichever format they are in.

`catalog` finds the files. It and `hf_config` import no torch, and neither does this page until weights are read: the
API process comes here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.weights.names import Part

if TYPE_CHECKING:
    import torch


def read_config(files: ModelFiles) -> ModelConfig:
    """The model's shape. Raises ModelError for files that cannot be read or a model that the engine does not know."""
    if files.format == "gguf":
        from pilotfish.engine.weights import gguf

        return gguf.read_config(files.path)
    from pilotfish.engine.weights import hf_config

    return hf_config.read_config(files.path)


def iter_weights(
    files: ModelFiles,
    config: ModelConfig,
    dtype: torch.dtype,
    parts: Mapping[str, Part] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under Hugging Face's name, in `dtype`, one at a time, in the order of the computation as far as they
    lie in one file.

    parts: of which tensors what is wanted, for instance a rank's (see `Layout.parts`); no more is read where the format
    allows it. None: all of all. device: where files are read straight to; None: the CPU.

    An fp8 checkpoint's matrices come as they are, each followed by its scales (see `quantization`).
    A tied head is left out. Raises ModelError if a tensor is missing, is not one of this model's, or has another shape
    than `config` gives it, wanted or not.
    """
    if files.format == "gguf":
        from pilotfish.engine.weights import gguf

        return gguf.iter_weights(files.path, config, dtype, parts)
    from pilotfish.engine.weights import safetensors

    return safetensors.iter_weights(files.path, config, dtype, parts, device)
