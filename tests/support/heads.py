"""A small drafter for a small target, trained for a moment: now and then it is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.models.config import Eagle3Config, ModelConfig, RopeConfig
from pilotfish.engine.models.eagle3_checkpoint import tensors_of
from pilotfish.engine.models.head_files import EMBEDDING
from pilotfish.tools.training.pipeline import Callbacks, TrainSettings, train_draft
from pilotfish.tools.training.settings import Kind
from pilotfish.tools.training.write import Frame


def train_head(target: Path, out: Path, kind: Kind = "eagle3") -> Path:
    """Returns `out`, the drafter's folder."""
    settings = TrainSettings(
        kind=kind,
        tokens=4_000,
        turn_tokens=8,
        answer_tokens=24,
        steps=60,
        batch_tokens=384,
        learning_rate=3e-3,
        draft_vocab_size=384,  # of 512: some of the target's tokens it cannot say
        feature_layers=(0, 1, 2),
        block_size=6,
        num_layers=1,
    )
    config = EngineConfig(model=str(target), kv_cache_memory=16 << 20, drafter=("ngram",), num_threads=1)
    callbacks = Callbacks(lambda count: None, lambda done, total: None, lambda progress: None)
    frame = Frame(before=(1,), after=(2, 1))
    train_draft(resolve(str(target)), config, frame, [], out, out / "work", settings, callbacks)
    return out


def head_config(draft_vocab_size: int, **shape: Any) -> Eagle3Config:
    """A head of four heads for a target of its own size with three layers; `shape`: of its layer."""
    decoder = ModelConfig(
        architecture="llama",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=1024,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
    )
    decoder = replace(decoder, **shape)
    size = decoder.hidden_size
    return Eagle3Config(
        decoder=decoder, draft_vocab_size=draft_vocab_size, target_hidden_size=size, feature_layers=(0, 1, 2)
    )


def head_weights(config: Eagle3Config, source: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights of a head that takes its embedding from the target, and norms of about 1."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(config).items():
        if name != EMBEDDING:
            numbers = torch.randn(tensor.shape, generator=source)
            weights[name] = 1 + 0.1 * numbers if len(tensor.shape) == 1 else 0.3 * numbers
    return weights
