"""Drafting with DFlash (arXiv 2602.06036): a block of tokens in one pass, each without knowing the others; and with
DSpark, whose heads let each know those before."""

from __future__ import annotations

from functools import partial

import torch

from pilotfish.checkpoints.catalog import ModelFiles, Progress
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.block_runner import BlockRunner
from pilotfish.engine.execution.loader import load_shared
from pilotfish.engine.execution.platform import Platform, check_draft
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.models import dflash_checkpoint
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import CausalModel
from pilotfish.engine.models.dflash import DFlashModel
from pilotfish.engine.models.head_files import EMBEDDING, HEAD
from pilotfish.engine.speculation.drafters.block_drafter import BlockDrafter
from pilotfish.engine.speculation.drafters.drafter import LoadedDraft, MakeRunner, check_vocabulary
from pilotfish.engine.speculation.drafters.feature_backlog import with_hidden_states
from pilotfish.errors import ConfigError


def load(
    name: str,
    files: ModelFiles,
    target: CausalModel,
    platform: Platform,
    config: EngineConfig,
    progress: Progress,
    comm: Communicator,
) -> LoadedDraft:
    """See `registry.load_draft`."""
    target = with_hidden_states(name, target)
    shape = dflash_checkpoint.read_config(files.path)
    check_draft(platform, name, shape.decoder, config)
    check_vocabulary(name, shape.decoder, target.config)
    dflash_checkpoint.check_target(name, shape, target.config)
    weights = dflash_checkpoint.read_weights(files.path, shape, platform.dtype)
    embedding, head = (part not in weights for part in (EMBEDDING, HEAD))
    if (embedding or head) and shape.decoder.hidden_size != target.config.hidden_size:
        raise ConfigError(f"drafter {name!r} takes its embedding or head from the target, which is of another size")
    with torch.inference_mode():
        model = DFlashModel(
            shape,
            platform.kernels,
            platform.attention,
            weights,
            # Published drafters name the context that they were trained on, and serve longer ones.
            max(shape.decoder.max_position, target.config.max_position) + shape.block_size,
            platform.device,
            platform.dtype,
            load_shared(target, platform, config, embedding, head, progress),
            target.embedding_scale,
        )
    # It is whole, beside the target's first shard.
    return LoadedDraft(name, model, shape.decoder, partial(_make, name, model))


def _make(
    name: str,
    model: DFlashModel,
    target: ModelConfig,
    config: EngineConfig,
    caches: list[LayerCache],
    num_blocks: int,
    device: torch.device,
    make_runner: MakeRunner,
) -> BlockDrafter:
    return BlockDrafter(
        name,
        BlockRunner(model, caches, config.block_size, device),
        BlockPool(num_blocks, config.block_size, config.prefix_caching),
        target.eos_token_ids,
        config.max_batch_tokens,
        keep_probs=config.verification == "rejection",
    )
