"""Weights of a Hugging Face folder: one model.safetensors, or several with model.safetensors.index.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.weights.hf_quantization import IGNORED_TENSORS
from engine.weights.names import HEAD, check_names, check_shape, expected_shapes
from engine.weights.quantization import FP8, SCALE

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old checkpoints hold the rotary frequencies, which follow from the configuration."""

_SIGHT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""The part of Gemma 3 that sees images, which the engine does not use."""


def iter_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.weights.iter_weights`. The files are mapped, so only the pages in use take memory."""
    with ExitStack() as stack:
        shards = {path: stack.enter_context(_open(path)) for path in _shards(folder)}
        places = {
            _text_name(stored): (path, stored)
            for path, shard in shards.items()
            for stored in shard.keys()  # noqa: SIM118
            if not _SIGHT.match(stored)
        }
        shapes = expected_shapes(config)
        ignored = {name for name in places if _BUFFER.fullmatch(name)}
        if config.tie_embeddings:
            ignored.add(HEAD)
        scales = set()
        if config.fp8 is not None:
            ignored |= {name for name in places if name.endswith(tuple(f".{end}" for end in IGNORED_TENSORS))}
            scales = {name + SCALE for name in shapes} & places.keys()
        check_names(folder, places.keys() - ignored - scales, shapes.keys())
        for name, wanted in shapes.items():
            path, stored = places[name]
            tensor = shards[path].get_tensor(stored)
            check_shape(path, name, tuple(tensor.shape), wanted)
            if not tensor.is_floating_point():
                raise ModelError(f"{path}: tensor {name!r} is {tensor.dtype}, but must be a floating-point one")
            if (tensor.dtype == FP8) != (name + SCALE in scales):
                raise ModelError(f"{path}: tensor {name!r} is {tensor.dtype}, {_SCALES[tensor.dtype != FP8]}")
            if tensor.dtype != FP8:
                yield name, tensor.to(dtype)
                continue
            yield name, tensor
            path, stored = places[name + SCALE]
            yield name + SCALE, _scale(path, name + SCALE, shards[path].get_tensor(stored), wanted[0])


_SCALES = ("but has no weight_scale, which fp8 weights need", "but has a weight_scale, which only fp8 weights need")


def _scale(path: Path, name: str, stored: torch.Tensor, channels: int) -> torch.Tensor:
    """(channels, 1) float32, from a scale for each channel or one for all."""
    if stored.numel() not in (1, channels):
        raise ModelError(
            f"{path}: tensor {name!r} has shape {tuple(stored.shape)}, but must have a scale for each of {channels} "
            "output channels, or one for all"
        )
    return stored.float().reshape(-1, 1).expand(channels, 1)


def _text_name(stored: str) -> str:
    """The name that a tensor of a model's text part has where the model has no other part."""
    if stored.startswith("model.language_model."):
        return "model." + stored.removeprefix("model.language_model.")
    return stored.removeprefix("language_model.")


def _shards(folder: Path) -> list[Path]:
    """The folder's weight files. An index decides if there is one, as other files may lie beside its own."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {error}") from error
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}: the engine reads safetensors files (or GGUF) only")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
