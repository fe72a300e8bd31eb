"""Reads a model's ModelConfig and its tensors from its files: the family declares them, a format's reader reads them.

No torch until weights are read: the planner and the server's process use this, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.checkpoints.gguf_header import read_header
from pilotfish.checkpoints.huggingface import head_kind, read_json
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.plausible import check_config, readable
from pilotfish.engine.models.registry import family_of, find_family, tensors_of
from pilotfish.engine.models.tensors import HEAD
from pilotfish.engine.weights.blocks import Blocks, Storage
from pilotfish.engine.weights.quantization import read_quantization
from pilotfish.engine.weights.tensors import Part, whole_parts
from pilotfish.errors import ModelError

if TYPE_CHECKING:
    import torch


def read_config(files: ModelFiles) -> ModelConfig:
    """The model's shape. Raises ModelError for files that cannot be read or a model that the engine does not know."""
    if files.format != "gguf":
        return read_hf_config(files.path)
    header = read_header(files.path)
    family = find_family(header.architecture, f"{files.path}: the architecture", "gguf_architectures")
    with readable(files.path):
        return check_config(files.path, family.read_gguf(header))


def read_hf_config(folder: Path) -> ModelConfig:
    """The shape that a Hugging Face folder's config.json describes. Raises ModelError."""
    path = folder / "config.json"
    raw = read_json(path)
    if kind := head_kind(folder):
        raise ModelError(f"{folder} is {kind}, which drafts for a model and is not one by itself")
    family = find_family(raw.get("model_type"), f"{path}: model_type", "model_types")
    values = Values(path, raw)
    with readable(path):
        config = check_config(path, family.read_hf(values))
        if values.within("quantization_config").get("quant_method") in family.own_quantization:
            return config
        return replace(config, quantization=read_quantization(path, raw))


def iter_weights(
    files: ModelFiles,
    config: ModelConfig,
    dtype: torch.dtype,
    parts: Mapping[str, Part] | None = None,
    device: torch.device | None = None,
    halves: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under Hugging Face's name, in `dtype`, one at a time, in the order of the computation as far as they
    lie in one file.

    parts: the parts of tensors to read, for instance a rank's (see `Layout.parts`), and no more where the format allows
    it; None: all tensors, whole. device: the device to read to, where the format can; None: the CPU.

    halves: matrices that are stored in 16 bits stay in them, in a Hugging Face folder.

    A quantized checkpoint's matrices come as they are, each followed by its scales (see `weights.quantization`).
    A tied head is left out. Raises ModelError if a tensor is missing, is not one of this model's, or has another shape
    than `config` gives it, wanted or not.
    """
    tensors = tensors_of(config)
    wanted = whole_parts(tensors) if parts is None else parts
    if files.format == "gguf":
        from pilotfish.engine.weights import gguf

        return gguf.iter_weights(files.path, tensors, dtype, wanted)
    import torch

    from pilotfish.engine.weights import safetensors

    family = family_of(config.architecture)
    if family.read_folder is not None:
        return family.read_folder(files.path, tensors, dtype, wanted, device or torch.device("cpu"))

    def name_of(stored: str) -> str | None:
        name = family.declared_name(stored)
        return None if name == HEAD and config.tie_embeddings else name

    return safetensors.iter_weights(
        files.path,
        tensors,
        dtype,
        wanted,
        device or torch.device("cpu"),
        name_of=name_of,
        quantization=config.quantization,
        halves=halves,
    )


def iter_blocks(
    files: ModelFiles, config: ModelConfig, dtype: torch.dtype, parts: Mapping[str, Part], storage: Storage
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    """As `iter_weights`, of a GGUF file, with matrices in the forms that they are stored in if `storage` has them."""
    from pilotfish.engine.weights import gguf

    return gguf.iter_stored(files.path, tensors_of(config), dtype, parts, storage)
