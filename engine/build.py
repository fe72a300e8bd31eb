"""From an EngineConfig to the parts of an engine: models, KV cache, drafters, verifier. Runs once, at start."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import msgspec

from pilotfish.checkpoints.catalog import Progress, resolve
from pilotfish.engine.child_process import LastWords
from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.device import synchronize
from pilotfish.engine.execution.buckets import span_lengths
from pilotfish.engine.execution.graphs import graph_backend, graph_memory, graph_plan
from pilotfish.engine.execution.loader import Platform, load_model
from pilotfish.engine.execution.runner import ModelRunner, Runner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.layout import check_divides
from pilotfish.engine.ranks.leader import Ranks, start_ranks
from pilotfish.engine.request import EngineInfo
from pilotfish.engine.speculation.control.calibration import make_controller
from pilotfish.engine.speculation.drafters.feature_router import FeatureRouter
from pilotfish.engine.speculation.drafters.registry import (
    check_speculation,
    find,
    load_draft,
    make_lookups,
    parse_entries,
    priors,
)
from pilotfish.engine.speculation.speculator import Speculator
from pilotfish.engine.verification.choose import make_verifier
from pilotfish.engine.verification.verifier import Verifier
from pilotfish.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Engine:
    info: EngineInfo
    runner: Runner
    pool: BlockPool
    speculator: Speculator
    verifier: Verifier
    ranks: Ranks | None = None
    """The others, if the model is divided."""

    def check(self) -> None:
        """Raise RankError if a rank has failed: what was computed since then is not to be used."""
        if self.ranks is not None:
            self.ranks.check()

    def other_memory(self) -> tuple[RankMemory, ...]:
        return self.ranks.memory() if self.ranks is not None else ()

    def close(self) -> None:
        """End the other ranks."""
        if self.ranks is not None:
            self.ranks.close()


def build(config: EngineConfig, progress: Progress, last_words: LastWords | None = None) -> Engine:
    """Raises ConfigError for settings that cannot work together, ModelError for a model that cannot be read, RankError
    for a rank that fails; for `last_words` see `engine.child_process`."""
    if config.node_rank:
        raise ConfigError(
            f"node_rank is {config.node_rank}, but an engine runs on node 0: `pilotfish serve` holds ranks"
        )
    parse_entries(config.drafter)
    if config.tensor_parallel_size == 1:
        return _build(config, progress, None)
    # Once, and not by all ranks of this host at the same time.
    files = resolve(config.model, progress, config.load_format != "dummy")
    find(config.drafter, files.name, progress)
    check_divides(read_config(files), config.tensor_parallel_size, model=files.name)
    ranks = start_ranks(config, progress, last_words)
    try:
        return _build(ranks.config, ranks.reported(progress), ranks)
    except BaseException as error:
        ranks.close(str(error) or type(error).__name__)
        raise


def _build(config: EngineConfig, progress: Progress, ranks: Ranks | None) -> Engine:
    start = time.perf_counter()
    comm = ALONE if ranks is None else ranks.comm
    target, platform, files = load_model(config.model, None, config, config.max_model_len, progress, comm)
    config = msgspec.structs.replace(config, block_size=platform.block_size)
    sources = find(config.drafter, files.name, progress)
    check_speculation(config.speculation, sources)
    draft_comm = comm if config.draft_tensor_parallel_size > 1 else ALONE
    with_files = [source for source in sources if source.kind.needs_files]
    drafts = [load_draft(source, target, platform, config, progress, draft_comm) for source in with_files]

    make_graphs = graph_backend(config.enforce_eager, platform.attention, platform.device)
    free = free_memory(platform.device)
    for_graphs = graph_memory(config, free) if make_graphs else 0
    padding = 1 if make_graphs else 0  # a block that is no sequence's, behind those that are
    shapes = [(target.config, comm.size), *((draft.shape, draft.ranks) for draft in drafts)]
    num_blocks = _block_count(config, shapes, platform, free - for_graphs, padding, progress, ranks)
    max_model_len = _max_model_len(config, target.config, num_blocks)

    progress("allocating the KV cache", 0.0)

    if ranks is not None:
        ranks.allocate(num_blocks, max_model_len)

    def runner(model: DecoderModel, caches: list[LayerCache]) -> Runner:
        alone = ModelRunner(model, caches, config.block_size, platform.device)
        return alone if ranks is None or model.comm.size == 1 else ranks.lead(alone)

    def caches(shape: ModelConfig, size: int) -> list[LayerCache]:
        return kv_cache.allocate(
            shape,
            platform.attention,
            num_blocks + padding,
            config.block_size,
            platform.cache_dtype,
            platform.device,
            size,
        )

    eos_token_ids = target.config.eos_token_ids
    target_runner = runner(target, caches(target.config, comm.size))
    drafters = [
        draft.make(target.config, config, caches(draft.shape, draft.ranks), num_blocks, platform.device, runner)
        for draft in drafts
    ]
    progress("allocating the KV cache", 1.0)

    if make_graphs:
        progress("capturing graphs", 0.0)
        planned = partial(graph_plan, config, make_graphs(), max_model_len, num_blocks, for_graphs)
        target_runner.capture("target", planned(span_lengths(config.num_draft_tokens)), FeatureRouter(drafters).layers)
        for drafter in drafters:
            drafter.capture(planned)
        progress("capturing graphs", 1.0)
    if ranks is not None:
        ranks.wait_prepared()

    def try_target(rows: int) -> None:  # what it writes to the cache nobody reads
        target_runner.run(target_runner.trial(rows))
        synchronize(platform.device)

    controller = None
    if config.adaptive_drafts:
        controller = make_controller(config, target.config, try_target, drafters, priors(sources), progress)
    lookups = make_lookups(sources, config)
    speculator = Speculator(lookups, drafters, config.num_draft_tokens, max_model_len, controller)
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
        tensor_parallel_size=comm.size,
        load_seconds=time.perf_counter() - start,
    )
    return Engine(
        info=info,
        runner=target_runner,
        pool=BlockPool(num_blocks, config.block_size, config.prefix_caching),
        speculator=speculator,
        verifier=make_verifier(config.verification, eos_token_ids, platform.device),
        ranks=ranks,
    )


def _block_count(
    config: EngineConfig,
    models: list[tuple[ModelConfig, int]],
    platform: Platform,
    free: int,
    padding: int,
    progress: Progress,
    ranks: Ranks | None,
) -> int:
    """Blocks that fit into the cache's memory, where a block of the target's comes with one of each draft's: so all
    caches hold the same number of tokens. `models`: each with the number of ranks that it is divided over; `padding`:
    blocks that are nobody's."""
    size = sum(kv_cache.block_bytes(model, config.block_size, platform.cache_dtype, parts) for model, parts in models)
    share = cache_share(config.kv_cache_share, on_gpu=platform.device.type == "cuda")
    memory = config.kv_cache_memory or int(share * free)
    count = (memory // size if ranks is None else ranks.block_count(size, free, progress)) - padding
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
