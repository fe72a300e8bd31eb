"""Loads a model by its name: finds its files, and reads its shape and its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from msgspec import structs

from pilotfish.checkpoints.catalog import ModelFiles, Progress, resolve
from pilotfish.checkpoints.huggingface import head_kind, read_json
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import give_back_memory
from pilotfish.engine.execution.platform import Platform, check_draft, choose_platform, choose_quantization
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.models.checkpoint import iter_blocks, iter_weights, read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import CausalModel, DecoderModel
from pilotfish.engine.models.eagle3 import SharedWeights
from pilotfish.engine.models.layout import Layout, check_divides
from pilotfish.engine.models.registry import is_known, tensors_of
from pilotfish.engine.models.tensors import EMBEDDING, HEAD
from pilotfish.engine.weights.blocks import Blocks, in_blocks
from pilotfish.engine.weights.dummy import iter_weights as dummy_weights
from pilotfish.engine.weights.quantization import SCALE, dequantized, quantized
from pilotfish.engine.weights.tensors import Part, whole
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

W = TypeVar("W", bound=torch.Tensor | Blocks)


def load_model(
    name: str,
    platform: Platform | None,
    config: EngineConfig,
    max_positions: int,
    progress: Progress,
    comm: Communicator = ALONE,
) -> tuple[DecoderModel, Platform, ModelFiles]:
    """Load a model, or the part of it that rank `comm.rank` has, onto its device.

    `platform` is the target's, if `name` is a draft model; None: `name` is the target, and its platform is chosen.
    `max_positions` 0: as many as the model was made for. Raises ModelError, ConfigError.
    """
    files = resolve(name, weights=config.load_format != "dummy")
    shape, is_target = shape_of(files, config), platform is None
    setting = "tensor_parallel_size" if platform is None else "draft_tensor_parallel_size"
    check_divides(shape, comm.size, None, setting, files.name)
    if platform is None:
        platform = choose_platform(config, shape, comm.size)
    else:
        check_draft(platform, name, shape, config, comm.size)
    quantization = choose_quantization(config, shape, platform.needs.capability)
    if quantization is not None:
        check_divides(shape, comm.size, quantization.scheme, setting, files.name)
    weights = _weights(files, shape, platform, config, Layout(shape, comm.rank, comm.size).parts(), progress)
    positions = max_positions or shape.max_position
    with torch.inference_mode():
        model = DecoderModel(
            shape,
            platform.kernels,
            platform.attention,
            weights,
            positions,
            platform.device,
            comm,
            adaptable=is_target and bool(config.lora or config.lora_updates),
        )
    give_back_memory(platform.device)  # of fused parts, and of tensors that were read ahead
    return model, platform, files


def shape_of(files: ModelFiles, config: EngineConfig) -> ModelConfig:
    """The model's shape, sharded as the settings say. Raises what `read_config` does."""
    shape = read_config(files)
    return replace(shape, expert_parallel=config.expert_parallel and shape.experts is not None)


def load_target(
    config: EngineConfig, progress: Progress, comm: Communicator = ALONE
) -> tuple[CausalModel, Platform, ModelFiles]:
    """As `load_model`, of `config.model`, by the code that `config.model_impl` chooses."""
    files = resolve(config.model, weights=config.load_format != "dummy")
    if not by_transformers(config, files):
        return load_model(config.model, None, config, config.max_model_len, progress, comm)
    from pilotfish.engine.models import transformers_config, transformers_model

    if comm.size > 1:
        raise ConfigError(f"tensor_parallel_size is {comm.size}, but transformers' code computes {files.name}: use 1")
    if config.lora or config.lora_updates:
        raise ConfigError(f"lora adapts the engine's own families, but transformers' code computes {files.name}")
    for name, value in (("kernels", config.kernels), ("quantization", config.quantization)):
        if value not in ("auto", "torch", "none"):
            raise ConfigError(f"{name} is {value!r}, but transformers' code computes {files.name}: leave it out")
    shape = transformers_config.read_config(files.path)
    platform = choose_platform(structs.replace(config, kernels="torch"), shape)
    progress(f"loading {files.name}", 0.0)
    logger.warning("%s is computed by transformers' code, which is slower than the engine's own families", files.name)
    with torch.inference_mode():
        theirs = transformers_model.load(files.path, shape, platform.dtype, config.load_format == "dummy")
        positions = config.max_model_len or shape.max_position
        model = transformers_model.TransformersModel(shape, theirs, platform.attention, positions, platform.device)
    progress(f"loading {files.name}", 1.0)
    needs = replace(platform.needs, head_dim=model.config.head_dim)
    return model, replace(platform, needs=needs, code="transformers"), files


def by_transformers(config: EngineConfig, files: ModelFiles) -> bool:
    """Whether transformers' code computes the model. Raises ConfigError if it is asked for and cannot."""
    if config.model_impl == "transformers" and files.format != "huggingface":
        raise ConfigError(f"model_impl is 'transformers', but {files.name} is a GGUF file: use a Hugging Face folder")
    if config.model_impl != "auto" or files.format != "huggingface":
        return config.model_impl == "transformers"
    return not is_known(read_json(files.path / "config.json").get("model_type")) and not head_kind(files.path)


def _weights(
    files: ModelFiles,
    shape: ModelConfig,
    platform: Platform,
    config: EngineConfig,
    parts: Mapping[str, Part],
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    """These parts of a model's tensors, in the forms that they are computed with."""
    device, dtype = platform.device, platform.dtype
    dummy = config.load_format == "dummy"
    tensors = tensors_of(shape)
    stored, wanted = shape.quantization, choose_quantization(config, shape, platform.needs.capability)

    def reported(found: Iterable[tuple[str, W]]) -> Iterator[tuple[str, W]]:
        done = 0
        for item in found:
            yield item
            done += not item[0].endswith(SCALE)
            progress(f"loading {files.name}", done / len(parts))

    def plain() -> Iterator[tuple[str, torch.Tensor]]:
        if dummy:
            return reported(dummy_weights(tensors, dtype, device, parts))
        weights = reported(iter_weights(files, shape, dtype, parts, device, platform.storage.halves))
        if stored is None or (wanted is not None and wanted.scheme == stored.scheme):
            return weights
        if wanted is None:
            logger.info("%s: its %s weights become %s, which takes more memory", files.name, stored.scheme, dtype)
        return dequantized(weights, dtype)

    if wanted is not None:
        return quantized(plain(), tensors, wanted, device)
    storage, kernels = platform.storage, platform.kernels
    weights: Iterator[tuple[str, torch.Tensor | Blocks]] = plain()
    if files.format == "gguf" and not dummy:
        weights = reported(iter_blocks(files, shape, dtype, parts, storage))
    if storage.layers is not None:
        assert isinstance(kernels, NativeKernels)
        weights = in_blocks(weights, tensors, storage, stored, kernels.quantize_blocks)
    return weights


def load_shared(
    target: DecoderModel, platform: Platform, config: EngineConfig, embedding: bool, head: bool, progress: Progress
) -> SharedWeights:
    """The target's embedding and head for an EAGLE-3 head on rank 0. Where the target is sharded, the ones that are
    needed are read once more, whole; the other may be a part."""
    shared = SharedWeights(target.embedding, target.head)
    head_name = EMBEDDING if target.config.tie_embeddings else HEAD
    names = {name for name, needed in ((EMBEDDING, embedding), (head_name, head)) if needed}
    if target.comm.size == 1 or not names:
        return shared
    files = resolve(config.model, weights=config.load_format != "dummy")
    tensors = tensors_of(target.config)
    parts = {name: whole(tensors[name].shape) for name in names}
    prepared = {}
    with torch.inference_mode():
        weights = dict(_weights(files, target.config, platform, config, parts, progress))
        for name in names:
            weight, scale = weights[name], weights.get(name + SCALE)
            if isinstance(weight, Blocks):
                prepared[name] = platform.kernels.prepare_blocks([weight])
                continue
            assert not isinstance(scale, Blocks)
            prepared[name] = platform.kernels.prepare_linear(weight.to(platform.device), None, scale)
    return SharedWeights(prepared.get(EMBEDDING, shared.embedding), prepared.get(head_name, shared.head))
