"""From the drafters that a configuration names to drafters that can be asked. Runs once, at start.

In two steps, since the KV cache is divided in between: `load_draft` reads a draft's weights, `make_drafter` makes it
one, with a runner of its own. What kind a draft is says `kind_of`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.buckets import span_lengths
from pilotfish.engine.execution.loader import Platform, Progress, check_draft, load_model, load_shared
from pilotfish.engine.execution.runner import HeadRunner, Runner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.models.model import Model
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.control.cost import RowCost
from pilotfish.engine.speculation.drafters.draft_model import DraftModelDrafter
from pilotfish.engine.speculation.drafters.drafter import CostlyDrafter, Drafter
from pilotfish.engine.speculation.drafters.eagle3 import Eagle3Drafter
from pilotfish.engine.speculation.drafters.ngram import NgramDrafter
from pilotfish.engine.speculation.drafters.prediction import PredictionDrafter
from pilotfish.engine.speculation.drafters.sources import Source
from pilotfish.engine.speculation.drafters.suffix import SuffixDrafter
from pilotfish.engine.weights import eagle3
from pilotfish.engine.weights.hf_config import is_eagle3
from pilotfish.engine.weights.names import expected_shapes
from pilotfish.errors import ConfigError

Kind = Literal["draft-model", "eagle3"]

CALIBRATED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the passes that are timed at start: as many as decoding and verification have."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft whose weights are there and whose cache is not yet."""

    name: str
    model: Model | Eagle3Model

    @property
    def shape(self) -> ModelConfig:
        """Of what has a KV cache."""
        return self.model.config.decoder if isinstance(self.model, Eagle3Model) else self.model.config

    @property
    def ranks(self) -> int:
        """That it is divided over."""
        return 1 if isinstance(self.model, Eagle3Model) else self.model.comm.size


def kind_of(files: ModelFiles) -> Kind:
    """What kind of draft these files hold. Raises ModelError for files that cannot be read."""
    return "eagle3" if files.format == "huggingface" and is_eagle3(files.path) else "draft-model"


def load_draft(
    source: Source,
    target: Model,
    platform: Platform,
    config: EngineConfig,
    progress: Progress,
    comm: Communicator = ALONE,
) -> LoadedDraft | None:
    """None for a drafter without weights. `comm`: of the ranks that a draft model is divided over.

    Raises ConfigError for a draft that does not go with the target, ModelError for one that cannot be read.
    """
    if source.files is None:
        return None
    if kind_of(source.files) == "eagle3":
        return LoadedDraft(source.name, _load_eagle3(source.name, source.files, target, platform, config, progress))
    model, _, _ = load_model(str(source.files.path), platform, config, target.config.max_position, progress, comm)
    _check_vocabulary(source.name, model.config.vocab_size, target.config)
    return LoadedDraft(source.name, model)


def _load_eagle3(
    name: str, files: ModelFiles, target: Model, platform: Platform, config: EngineConfig, progress: Progress
) -> Eagle3Model:
    shape = eagle3.read_config(files.path)
    check_draft(platform, name, shape.decoder, config)
    _check_vocabulary(name, shape.decoder.vocab_size, target.config)
    if shape.target_hidden_size != target.config.hidden_size:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of size {shape.target_hidden_size}, the target's are "
            f"{target.config.hidden_size}: it was made for another target"
        )
    if max(shape.features_of(target.config)) > target.config.num_layers:
        raise ConfigError(
            f"drafter {name!r} reads layers {shape.features_of(target.config)}, the target has "
            f"{target.config.num_layers}: it was made for another target"
        )
    weights = eagle3.read_weights(files.path, shape, platform.dtype)
    if "embed_tokens.weight" not in weights and shape.decoder.hidden_size != target.config.hidden_size:
        raise ConfigError(f"drafter {name!r} has no embedding of its own, and the target's is of another size")
    embedding, head = (part not in weights for part in ("embed_tokens.weight", "lm_head.weight"))
    shared = load_shared(target, platform, config, embedding, head, progress)
    with torch.inference_mode():
        return Eagle3Model(
            shape,
            platform.kernels,
            platform.attention,
            weights,
            # Published heads name the context that they were trained on, and serve longer ones.
            max(shape.decoder.max_position, target.config.max_position),
            platform.device,
            platform.dtype,
            shared,
        )


def _check_vocabulary(name: str, size: int, target: ModelConfig) -> None:
    if size != target.vocab_size:
        raise ConfigError(
            f"drafter {name!r} has a vocabulary of {size} tokens, the target of {target.vocab_size}: a draft needs the "
            "target's own tokenizer"
        )


def make_drafter(
    draft: LoadedDraft,
    target: ModelConfig,
    config: EngineConfig,
    caches: list[LayerCache],
    num_blocks: int,
    device: torch.device,
    make_runner: Callable[[Model, list[LayerCache]], Runner],
) -> CostlyDrafter:
    """`caches`: of the draft's layers, of `num_blocks` blocks for sequences, as many as the target's. `make_runner`: of
    a draft model and its caches."""
    keep_probs = config.verification == "rejection"
    eos, rows = target.eos_token_ids, config.max_batch_tokens
    if isinstance(draft.model, Eagle3Model):
        layers = draft.model.config.features_of(target)
        pool = BlockPool(num_blocks, config.block_size, False)  # what a block holds depends on more than its tokens
        head = HeadRunner(draft.model, caches[0], config.block_size, device)
        lengths = span_lengths(config.num_draft_tokens)
        return Eagle3Drafter(draft.name, head, layers, pool, eos, rows, lengths, keep_probs)
    runner = make_runner(draft.model, caches)
    pool = BlockPool(num_blocks, config.block_size, config.prefix_caching)
    return DraftModelDrafter(draft.name, runner, pool, eos, rows, keep_probs)


def free_drafters(sources: list[Source], config: EngineConfig) -> list[Drafter]:
    """Those that have no weights. `prediction` is always there: without a prediction it costs nothing."""
    made: list[Drafter] = []
    for source in sources:
        if source.name == NgramDrafter.name:
            made.append(NgramDrafter(config.ngram_max, config.ngram_min))
        elif source.name == SuffixDrafter.name:
            made.append(SuffixDrafter())
    return [*made, PredictionDrafter()]


def make_controller(
    config: EngineConfig,
    target: ModelConfig,
    try_target: Callable[[int], object],
    drafters: list[Drafter],
    progress: Progress,
) -> Controller:
    """A controller that knows what passes take here. `try_target`: a pass of the target over so many rows."""
    controller = Controller(config.num_draft_tokens, {drafter.name: drafter.prior for drafter in drafters})
    counts = [rows for rows in CALIBRATED if rows <= config.max_batch_tokens]
    attempts = {drafter.name: drafter.try_pass for drafter in drafters if isinstance(drafter, CostlyDrafter)}
    progress("measuring", 0.0)
    share = _context_share(target)
    measured = _timed(try_target, counts)
    controller.target.calibrate(measured, share * measured[1])
    for i, (name, attempt) in enumerate(attempts.items(), start=1):
        progress("measuring", i / (1 + len(attempts)))
        controller.drafting[name] = RowCost()
        measured = _timed(attempt, counts)
        controller.drafting[name].calibrate(measured, share * measured[1])
    progress("measuring", 1.0)
    return controller


def _context_share(model: ModelConfig) -> float:
    """What a token of context costs, as a share of a pass over one row, if both are but memory to be read. Of a draft
    of the target's kind it is about the same; what it really is will be learned."""
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return cached / sum(math.prod(shape) for shape in expected_shapes(model).values())


def _timed(attempt: Callable[[int], object], counts: list[int]) -> dict[int, float]:
    """Seconds of a pass by rows, each the better of two."""
    seconds: dict[int, float] = {}
    for rows in counts:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            attempt(rows)
            times.append(time.perf_counter() - begin)
        seconds[rows] = min(times)
    return seconds
