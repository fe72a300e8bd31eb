"""A small drafter for a small target, trained for a moment: now and then it is right."""

from __future__ import annotations

from pathlib import Path

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
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
