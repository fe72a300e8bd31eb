"""Assembly: loads the models that one rank computes, allocates their caches and captures their passes.

Rank 0 and its followers run the same code, so they cannot disagree on the models and their order, the size of the
caches, or the captured passes. Only rank 0 has models that are not sharded. `build` makes the rest of an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.config import CPU_BACKLOG, EngineConfig, with_step_limits
from pilotfish.engine.device import gpu_memory
from pilotfish.engine.execution.buckets import GRAPH_SHARE, buckets
from pilotfish.engine.execution.graphs import GraphPlan, graph_backend
from pilotfish.engine.execution.loader import load_target
from pilotfish.engine.execution.runner import Lead, ModelRunner, drawing_of
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.memory.kv_cache import CacheRoom
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import CausalModel, DecoderModel
from pilotfish.engine.speculation.drafters.drafter import LoadedDraft, ModelDrafter
from pilotfish.engine.speculation.drafters.feature_router import FeatureRouter
from pilotfish.engine.speculation.drafters.registry import check_speculation, find, load_draft
from pilotfish.engine.step_memory import step_memory


class Assembly:
    """Loads the models of rank `comm.rank` when it is made; then `room`, `allocate` and `capture`, in this order.

    Raises what `load_model` and `load_draft` do, and ConfigError for a `speculation` that is none of these drafters.
    """

    def __init__(self, config: EngineConfig, comm: Communicator, progress: Progress) -> None:
        self.target, self.platform, self.files = load_target(config, progress, comm)
        config = with_step_limits(config, gpu_memory(self.platform.device))
        self.adapters = {name: self._adapter(Path(folder)) for name, folder in config.adapters().items()}
        """Numbers of the adapters that are loaded at start, by their names."""
        self.config = config = msgspec.structs.replace(config, block_size=self.platform.block_size)
        draft_comm = comm if config.draft_tensor_parallel_size > 1 else ALONE
        # A rank that computes no draft model need not have its files.
        takes_part = comm.rank == 0 or draft_comm.size > 1
        self.sources = find(config.drafter, self.files.name, progress, config.suffix_memory > 0) if takes_part else []
        if comm.rank == 0:
            check_speculation(config.speculation, self.sources)
        self._drafts: list[LoadedDraft] = [
            load_draft(source, self.target, self.platform, config, progress, draft_comm)
            for source in self.sources
            if source.kind.needs_files and (comm.rank == 0 or source.kind.sharded)
        ]
        # Nothing is known of what other code than a DecoderModel's does on the host, and experts are grouped there.
        experts = any(each.experts is not None for each in (self.target.config, *(d.shape for d in self._drafts)))
        eager = config.enforce_eager or experts or not isinstance(self.target, DecoderModel)
        self._make_graphs = graph_backend(eager, self.platform.attention, self.platform.device)
        self._graph_memory = self._num_blocks = 0
        self._lead: Callable[[int], Lead] | None = None
        self.runner: ModelRunner
        """The target's, once `allocate` was called."""
        self.sharded: list[ModelRunner] = []
        """The runners of all sharded models, in the order in which passes number them; the target's is the first."""
        self.drafters: list[ModelDrafter] = []

    def _adapter(self, folder: Path) -> int:
        assert isinstance(self.target, DecoderModel)
        assert self.target.adapters is not None
        return self.target.adapters.load(folder)

    @property
    def captures(self) -> bool:
        """Whether passes are captured on this device."""
        return self._make_graphs is not None

    @property
    def padding(self) -> int:
        """Blocks at the end of every cache that belong to no sequence: captured passes write their padding there."""
        return int(self.captures)

    def limit_steps(self, max_num_seqs: int, max_batch_tokens: int) -> None:
        """Take over rank 0's limits of steps, before `room`."""
        self.config = msgspec.structs.replace(self.config, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens)

    def room(self) -> CacheRoom:
        """The memory that is free for caches on this rank now that its weights are loaded, less what a step takes, and
        the bytes of one block in all of them: all caches have the same number of blocks. All ranks measure at the same
        time."""
        drafts: list[CausalModel] = [each.model for each in self._drafts if isinstance(each.model, DecoderModel)]
        taken = step_memory(self.target, drafts, self.platform, self.config)
        free = max(0, free_memory(self.platform.device) - taken)
        if self.captures:
            self._graph_memory = self.config.cuda_graph_memory or int(GRAPH_SHARE * free)
        shapes = [(self.target.config, self.target.comm.size), *((draft.shape, draft.ranks) for draft in self._drafts)]
        sizes = [
            kv_cache.block_bytes(shape, self.config.block_size, self.platform.cache_dtype, ranks)
            for shape, ranks in shapes
        ]
        return CacheRoom(free - self._graph_memory, sum(sizes))

    def allocate(self, num_blocks: int, lead: Callable[[int], Lead] | None = None) -> None:
        """Allocate caches of `num_blocks` blocks for sequences, and make the runners and drafters. On rank 0,
        `lead` makes the Lead of the sharded model with this number."""
        self._num_blocks, self._lead = num_blocks, lead
        config = self.config
        if self.platform.device.type == "cpu":
            rows = max(config.max_num_seqs, min(config.max_batch_tokens, CPU_BACKLOG))
            config = msgspec.structs.replace(config, max_batch_tokens=rows)
        self.runner = self._runner(self.target, self._caches(self.target.config, self.target.comm.size))
        self.drafters = [
            draft.make(
                self.target.config,
                config,
                self._caches(draft.shape, draft.ranks),
                num_blocks,
                self.platform.device,
                self._runner,
            )
            for draft in self._drafts
        ]

    def capture(self, max_model_len: int) -> None:
        """Capture the passes of all models, if this device captures any; all ranks do so at the same time."""
        if self._make_graphs is None:
            return
        config = self.config
        backend = self._make_graphs()

        def planned(chunks: bool = False) -> GraphPlan:
            return GraphPlan(
                backend=backend,
                buckets=buckets(config.max_num_seqs, config.num_draft_tokens, config.max_batch_tokens, chunks),
                max_len=max_model_len,
                padding_block=self._num_blocks,
                memory=self._graph_memory,
            )

        feature_layers = FeatureRouter(self.drafters).layers
        self.runner.capture("target", planned(chunks=True), feature_layers, draws=self.target.comm.rank == 0)
        for drafter in self.drafters:
            drafter.capture(planned)

    def _runner(self, model: CausalModel, caches: list[LayerCache]) -> ModelRunner:
        sharded = model.comm.size > 1
        lead = self._lead(len(self.sharded)) if self._lead and sharded else None
        draw = drawing_of(self.platform.kernels)
        runner = ModelRunner(model, caches, self.config.block_size, self.platform.device, lead, draw)
        if sharded:
            self.sharded.append(runner)
        return runner

    def _caches(self, shape: ModelConfig, ranks: int) -> list[LayerCache]:
        platform = self.platform
        blocks = self._num_blocks + self.padding
        return kv_cache.allocate(
            shape, platform.attention, blocks, platform.block_size, platform.cache_dtype, platform.device, ranks
        )
