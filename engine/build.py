"""From an EngineConfig to the parts of an engine: models, KV cache, drafters, verifier. Runs once, at start."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import msgspec

from engine.config import EngineConfig
from engine.device import synchronize
from engine.errors import ConfigError
from engine.execution.buckets import GRAPH_SHARE, batch_sizes, buckets, span_lengths
from engine.execution.graphs import GraphBackend, GraphPlan, graph_backend
from engine.execution.loader import Platform, Progress, load_model
from engine.execution.runner import ModelRunner
from engine.layers.attention.interface import LayerCache
from engine.memory import kv_cache
from engine.memory.block_pool import BlockPool
from engine.memory.free import free_memory
from engine.models.config import ModelConfig
from engine.request import EngineInfo
from engine.speculation.drafter import CostlyDrafter
from engine.speculation.portfolio import free_drafters, load_draft, make_controller, make_drafter
from engine.speculation.sources import check_speculation, find
from engine.speculation.speculator import Speculator, feature_layers
from engine.speculation.verify import CoupledVerifier, RejectionVerifier, Verifier


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
    config = msgspec.structs.replace(config, block_size=platform.block_size)
    sources = find(config.drafter, files.name, progress)
    check_speculation(config.speculation, sources)
    loaded = [load_draft(source, target, platform, config, progress) for source in sources]
    drafts = [draft for draft in loaded if draft is not None]

    make_graphs = graph_backend(config.enforce_eager, platform.attention, platform.device)
    free = free_memory(platform.device)
    graph_memory = (config.cuda_graph_memory or int(GRAPH_SHARE * free)) if make_graphs else 0
    padding = 1 if make_graphs else 0  # a block that is no sequence's, behind those that are
    shapes = [target.config, *(draft.shape for draft in drafts)]
    num_blocks = _block_count(config, shapes, platform, free - graph_memory, padding)
    max_model_len = _max_model_len(config, target.config, num_blocks)

    progress("allocating the KV cache", 0.0)

    def caches(shape: ModelConfig) -> list[LayerCache]:
        return kv_cache.allocate(
            shape, platform.attention, num_blocks + padding, config.block_size, platform.cache_dtype, platform.device
        )

    eos_token_ids = target.config.eos_token_ids
    drafters = free_drafters(sources, config)
    drafters += [
        make_drafter(draft, target.config, config, caches(draft.shape), num_blocks, platform.device) for draft in drafts
    ]
    target_runner = ModelRunner(target, caches(target.config), config.block_size, platform.device)
    progress("allocating the KV cache", 1.0)

    if make_graphs:
        progress("capturing graphs", 0.0)
        planned = partial(graph_plan, config, make_graphs(), max_model_len, num_blocks, graph_memory)
        target_runner.capture("target", planned(span_lengths(config.num_draft_tokens)), feature_layers(drafters))
        for drafter in drafters:
            if isinstance(drafter, CostlyDrafter):
                drafter.capture(planned)
        progress("capturing graphs", 1.0)

    def try_target(rows: int) -> None:  # what it writes to the cache nobody reads
        target_runner.run(target_runner.trial(rows))
        synchronize(platform.device)

    controller = (
        make_controller(config, target.config, try_target, drafters, progress) if config.adaptive_drafts else None
    )
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
        kernels=platform.kernels_name,
        load_seconds=time.perf_counter() - start,
    )
    return Engine(
        info=info,
        runner=target_runner,
        pool=BlockPool(num_blocks, config.block_size, config.prefix_caching),
        speculator=speculator,
        verifier=verifier(eos_token_ids),
    )


def graph_plan(
    config: EngineConfig,
    backend: GraphBackend,
    max_model_len: int,
    num_blocks: int,
    memory: int,
    lengths: tuple[int, ...],
) -> GraphPlan:
    """What to capture of a model whose spans have these lengths. `num_blocks`: those that are sequences'."""
    return GraphPlan(
        backend=backend,
        buckets=buckets(batch_sizes(config.max_num_seqs), lengths, config.max_batch_tokens),
        max_len=max_model_len,
        padding_block=num_blocks,
        memory=memory,
    )


def _block_count(config: EngineConfig, models: list[ModelConfig], platform: Platform, free: int, padding: int) -> int:
    """Blocks that fit into the cache's memory, where a block of the target's comes with one of each draft's: so all
    caches hold the same number of tokens. `padding`: blocks that are nobody's."""
    size = sum(kv_cache.block_bytes(model, config.block_size, platform.cache_dtype) for model in models)
    memory = config.kv_cache_memory or int(config.kv_cache_share * free)
    count = memory // size - padding
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
