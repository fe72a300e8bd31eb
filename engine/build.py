"""Builds the parts of an engine from an EngineConfig, once, at start."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from pilotfish.checkpoints.catalog import ModelFiles, Progress, resolve
from pilotfish.engine.assembly import Assembly
from pilotfish.engine.child_process import LastWords
from pilotfish.engine.config import EngineConfig, cache_share
from pilotfish.engine.device import synchronize
from pilotfish.engine.device.gpu import use_gpu
from pilotfish.engine.execution.loader import by_transformers, shape_of
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.cache_events import CacheEvents
from pilotfish.engine.memory.event_publisher import EventPublisher
from pilotfish.engine.memory.kv_cache import check_room, count_blocks
from pilotfish.engine.memory.usage import RankMemory
from pilotfish.engine.models.adapters import Adapters
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.layout import check_divides
from pilotfish.engine.models.registry import parameter_count
from pilotfish.engine.pace import PrefillPace
from pilotfish.engine.ranks.leader import Ranks, start_ranks
from pilotfish.engine.request import EngineInfo
from pilotfish.engine.speculation.control.calibration import make_controller
from pilotfish.engine.speculation.drafters.corpus import read_corpus
from pilotfish.engine.speculation.drafters.drafter import Drafter, RememberingDrafter
from pilotfish.engine.speculation.drafters.registry import find, make_lookups, parse_entries, priors
from pilotfish.engine.speculation.speculator import Speculator, lengths_of
from pilotfish.engine.verification.choose import make_verifier
from pilotfish.engine.verification.verifier import Verifier
from pilotfish.errors import ConfigError
from pilotfish.text.grammar.matcher import Compiler, load_vocabulary
from pilotfish.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine, which `EngineCore` puts to work."""

    info: EngineInfo
    runner: ModelRunner
    pool: BlockPool
    speculator: Speculator
    verifier: Verifier
    grammars: Compiler
    pace: PrefillPace = field(default_factory=PrefillPace)
    """Bounds the chunks of prompts beside sequences that decode."""
    ranks: Ranks | None = None
    """The other ranks, if the model is sharded."""
    adapters: Adapters | None = None
    """Loads the target's low-rank adapters, if it may have any."""
    loaded: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the adapters that were loaded at start, by their names."""
    publisher: EventPublisher | None = None
    """Tells others what the pool's prefix cache has, if they are to know."""

    def check(self) -> None:
        """Raise RankError if a rank has failed: results since then must not be used."""
        if self.ranks is not None:
            self.ranks.check()

    def other_memory(self) -> tuple[RankMemory, ...]:
        return self.ranks.memory() if self.ranks is not None else ()

    def publish_cache(self) -> None:
        """Send the events of the prefix cache since the last call."""
        if self.publisher is not None and self.pool.events is not None:
            self.publisher.publish(self.pool.events.take())

    def close(self) -> None:
        """End the other ranks, the compiling of grammars, and the events of the cache."""
        self.grammars.close()
        if self.publisher is not None:
            self.publisher.close()
        if self.ranks is not None:
            self.ranks.close()


def build(config: EngineConfig, progress: Progress, last_words: LastWords | None = None) -> Engine:
    """Build the engine, and start the other ranks of a sharded model. For `last_words` see `engine.child_process`.

    Raises ConfigError for settings that contradict each other, ModelError for unreadable files, RankError for a failure
    of a rank.
    """
    if config.node_rank:
        raise ConfigError(
            f"node_rank is {config.node_rank}, but an engine runs on node 0: `pilotfish serve` holds ranks"
        )
    parse_entries(config.drafter)
    use_gpu(config.device)  # the error comes before a model is looked for
    if config.tensor_parallel_size == 1:
        return _build(config, progress, None)
    # Download and check once here, not in all ranks of this host at the same time.
    files = resolve(config.model, progress, config.load_format != "dummy")
    find(config.drafter, files.name, progress, config.suffix_memory > 0)
    if by_transformers(config, files):
        size = config.tensor_parallel_size
        raise ConfigError(f"tensor_parallel_size is {size}, but transformers' code computes {files.name}: use 1")
    check_divides(shape_of(files, config), config.tensor_parallel_size, model=files.name)
    ranks = start_ranks(config, progress, last_words)
    try:
        return _build(ranks.config, ranks.reported(progress), ranks)
    except BaseException as error:
        ranks.close(str(error) or type(error).__name__)
        raise


def _build(config: EngineConfig, progress: Progress, ranks: Ranks | None) -> Engine:
    start = time.perf_counter()
    assembly = Assembly(config, ALONE if ranks is None else ranks.comm, progress)
    config, target, platform = assembly.config, assembly.target, assembly.platform
    num_blocks = _num_blocks(assembly, progress, ranks)
    max_model_len = _max_model_len(config, target.config, num_blocks)

    progress("allocating the KV cache", 0.0)
    if ranks is not None:
        ranks.allocate(num_blocks, max_model_len)
    assembly.allocate(num_blocks, None if ranks is None else ranks.lead)
    progress("allocating the KV cache", 1.0)
    if assembly.captures:
        progress("capturing graphs", 0.0)
        assembly.capture(max_model_len)
        progress("capturing graphs", 1.0)
    if ranks is not None:
        ranks.wait_prepared()

    def try_target(rows: int) -> None:  # nobody reads what it writes to the cache
        assembly.runner.run(assembly.runner.trial(rows))
        synchronize(platform.device)

    lookups, controller = make_lookups(assembly.sources, config), None
    if config.suffix_corpus:
        _warm(lookups, config, assembly.files)
    if config.adaptive_drafts:
        known, lengths = priors(assembly.sources), lengths_of(lookups)
        controller = make_controller(config, target.config, try_target, assembly.drafters, known, lengths, progress)
    speculator = Speculator(lookups, assembly.drafters, config.num_draft_tokens, max_model_len, controller)
    info = EngineInfo(
        model=assembly.files.name,
        vocab_size=target.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=target.config.eos_token_ids,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        drafters=speculator.names,
        default_drafter="off" if config.speculation == "none" else config.speculation,
        dtype=str(platform.dtype).removeprefix("torch."),
        weights=target.weight_forms if isinstance(target, DecoderModel) else (),
        device=str(platform.device),
        kernels=platform.kernels_name,
        tensor_parallel_size=target.comm.size,
        adapters=tuple(assembly.adapters),
        load_seconds=time.perf_counter() - start,
    )
    publisher = None
    if config.kv_events_endpoint:
        publisher = EventPublisher(config.kv_events_endpoint, config.kv_events_replay_endpoint, config.kv_events_topic)
    return Engine(
        info=info,
        runner=assembly.runner,
        pool=BlockPool(
            num_blocks, config.block_size, config.prefix_caching, None if publisher is None else CacheEvents()
        ),
        speculator=speculator,
        verifier=make_verifier(config.verification, target.config.eos_token_ids, platform.device),
        grammars=Compiler(partial(load_vocabulary, assembly.files, target.config.vocab_size, info.eos_token_ids)),
        pace=PrefillPace(config.max_prefill_ms / 1000, _pair_share(target.config)),
        ranks=ranks,
        adapters=target.adapters if isinstance(target, DecoderModel) else None,
        loaded=assembly.adapters,
        publisher=publisher,
    )


def _warm(lookups: list[Drafter], config: EngineConfig, files: ModelFiles) -> None:
    """Give the files of `suffix_corpus` to the drafters that remember."""
    remembering = [each for each in lookups if isinstance(each, RememberingDrafter)]
    if not remembering:
        raise ConfigError("suffix_corpus needs the drafter suffix-memory: name it, too, or no drafter at all")
    tokenizer = load_tokenizer(files)
    texts = read_corpus(config.suffix_corpus, lambda text: tokenizer.encode(text, add_special_tokens=False))
    for each in remembering:
        each.warm(texts)


def _pair_share(model: ModelConfig) -> float:
    """The operations of attention between a query and a key, relative to those of all else for a row."""
    return 2 * model.num_layers * model.num_heads * model.head_dim / parameter_count(model)


def _num_blocks(assembly: Assembly, progress: Progress, ranks: Ranks | None) -> int:
    """The number of blocks for sequences, the same in all caches on all ranks."""
    config, on_gpu = assembly.config, assembly.platform.device.type == "cuda"
    if ranks is None:
        rooms, sharing = [assembly.room()], 1
    else:
        rooms, sharing = ranks.rooms(config, assembly.room, progress), ranks.sharing
    check_room(config, rooms, sharing)
    count = count_blocks(config, rooms, sharing, on_gpu) - assembly.padding
    if count < 2:
        own = rooms[0]
        memory = config.kv_cache_memory or int(cache_share(config.kv_cache_share, on_gpu) * own.free)
        raise ConfigError(
            f"the KV cache has {memory} bytes, but one block of {config.block_size} tokens takes {own.block_bytes}: "
            "raise kv_cache_memory or lower block_size"
        )
    return count


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    room = num_blocks * config.block_size
    if config.max_model_len > model.longest:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but the model's context is {model.longest}")
    if config.max_model_len > room:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the KV cache holds {room} tokens: "
            "raise kv_cache_memory or lower max_model_len"
        )
    return config.max_model_len or min(model.max_position, room)
