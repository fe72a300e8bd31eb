"""From an EngineConfig to the parts of an engine: models, KV cache, drafters, verifier. Runs once, at start."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.loader import Platform, Progress, load_model
from engine.execution.runner import ModelRunner
from engine.execution.spans import Span
from engine.memory import kv_cache
from engine.memory.block_pool import BlockPool
from engine.memory.free import free_memory
from engine.models.config import ModelConfig
from engine.models.interface import Model
from engine.request import EngineInfo
from engine.speculation.controller import Controller
from engine.speculation.draft_model import DraftModelDrafter
from engine.speculation.drafter import Drafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.prediction import PredictionDrafter
from engine.speculation.speculator import Speculator
from engine.speculation.suffix import SuffixDrafter
from engine.speculation.verify import CoupledVerifier, RejectionVerifier, Verifier

CALIBRATED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the passes that are timed at start: as many as decoding and verification have."""


@dataclass(frozen=True, slots=True)
class Engine:
    info: EngineInfo
    runner: ModelRunner
    pool: BlockPool
    speculator: Speculator
    verifier: Verifier


def build(config: EngineConfig, progress: Progress) -> Engine:
    """Raises ConfigError for settings that cannot work together, ModelError for a model that cannot be read."""
    start = time.perf_counter()
    target, platform, files = load_model(config.model, None, config, config.max_model_len, progress)
    draft = None
    if config.draft_model is not None:
        draft, _, _ = load_model(config.draft_model, platform, config, target.config.max_position, progress)
        _check_draft(target.config, draft.config, config.draft_model)

    models = [target.config] if draft is None else [target.config, draft.config]
    num_blocks = _block_count(config, models, platform)
    max_model_len = _max_model_len(config, target.config, num_blocks)

    progress("allocating the KV cache", 0.0)

    def runner(model: Model) -> ModelRunner:
        caches = kv_cache.allocate(
            model.config, platform.attention, num_blocks, config.block_size, platform.dtype, platform.device
        )
        return ModelRunner(model, caches, config.block_size, platform.device)

    eos_token_ids = target.config.eos_token_ids
    drafters: list[Drafter] = [
        NgramDrafter(config.ngram_max, config.ngram_min),
        SuffixDrafter(),
        PredictionDrafter(),
    ]
    if draft is not None:
        pool = BlockPool(num_blocks, config.block_size, config.prefix_caching)
        keep_probs = config.verification == "rejection"
        drafters.append(DraftModelDrafter(runner(draft), pool, eos_token_ids, config.max_batch_tokens, keep_probs))
    target_runner = runner(target)
    controller = None
    if config.adaptive_drafts:
        controller = Controller()
        controller.target.calibrate(_calibrate(target_runner, config, progress))
    speculator = Speculator(drafters, config.num_draft_tokens, max_model_len, controller)
    verifier = RejectionVerifier if config.verification == "rejection" else CoupledVerifier
    info = EngineInfo(
        model=files.name,
        vocab_size=target.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        drafters=speculator.names,
        default_drafter="off" if config.speculation == "none" else config.speculation,
        dtype=str(platform.dtype).removeprefix("torch."),
        device=str(platform.device),
        kernels=platform.kernels.name,
        load_seconds=time.perf_counter() - start,
    )
    return Engine(
        info=info,
        runner=target_runner,
        pool=BlockPool(num_blocks, config.block_size, config.prefix_caching),
        speculator=speculator,
        verifier=verifier(eos_token_ids),
    )


def _calibrate(runner: ModelRunner, config: EngineConfig, progress: Progress) -> dict[int, float]:
    """Seconds of a pass by rows, each the better of two; what it writes to the cache nobody reads."""
    counts = [rows for rows in CALIBRATED if rows <= config.max_batch_tokens]
    seconds: dict[int, float] = {}
    for i, rows in enumerate(counts):
        spans = [Span([0] * rows, 0, [0] * -(-rows // config.block_size), logit_rows=rows)]
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            runner.run(spans)
            times.append(time.perf_counter() - begin)
        seconds[rows] = min(times)
        progress("measuring", (i + 1) / len(counts))
    return seconds


def _check_draft(target: ModelConfig, draft: ModelConfig, name: str) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model {name!r} has a vocabulary of {draft.vocab_size} tokens, the target of {target.vocab_size}: "
            "a draft needs the target's own tokenizer"
        )


def _block_count(config: EngineConfig, models: list[ModelConfig], platform: Platform) -> int:
    """Blocks that fit into the cache's memory, where a block of the target's comes with one of the draft's."""
    size = sum(kv_cache.block_bytes(model, config.block_size, platform.dtype) for model in models)
    memory = config.kv_cache_memory or int(config.kv_cache_share * free_memory(platform.device))
    count = memory // size
    if count < 2:
        raise ConfigError(
            f"the KV cache has {memory} bytes, but one block of {config.block_size} tokens takes {size}: "
            "raise kv_cache_memory or lower block_size"
        )
    return count


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    room = num_blocks * config.block_size
    if config.max_model_len > model.max_position:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but the model's context is {model.max_position}")
    if config.max_model_len > room:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the KV cache holds {room} tokens: "
            "raise kv_cache_memory or lower max_model_len"
        )
    return config.max_model_len or min(model.max_position, room)
