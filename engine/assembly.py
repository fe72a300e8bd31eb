"""Assembly: the models that one rank computes, on their way from files to captured passes.

Rank 0 and its followers go through the same steps with the same code, so they cannot disagree on which models there are
and in which order, on the size of their caches, or on the passes that are captured. A model that is not sharded is rank
0's alone. What an engine has besides models is in `build`; how ranks keep step is in `ranks`.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pilotfish.checkpoints.catalog import Progress
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.buckets import GRAPH_SHARE, batch_sizes, buckets, span_lengths
from pilotfish.engine.execution.graphs import GraphPlan, graph_backend
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.runner import Lead, ModelRunner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.free import free_memory
from pilotfish.engine.memory.kv_cache import CacheRoom
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.speculation.drafters.drafter import LoadedDraft, ModelDrafter
from pilotfish.engine.speculation.drafters.feature_router import FeatureRouter
from pilotfish.engine.speculation.drafters.registry import check_speculation, find, load_draft


class Assembly:
    """Loads the models of rank `comm.rank` when it is made; then `room`, `allocate` and `capture`, in this order.

    Raises what `load_model` and `load_draft` do, and ConfigError for a `speculation` that these drafters have not.
    """

    def __init__(self, config: EngineConfig, comm: Communicator, progress: Progress) -> None:
        self.target, self.platform, self.files = load_model(
            config.model, None, config, config.max_model_len, progress, comm
        )
        self.config = config = msgspec.structs.replace(config, block_size=self.platform.block_size)
        draft_comm = comm if config.draft_tensor_parallel_size > 1 else ALONE
        # Without a part in a draft, a rank need not have its files.
        takes_part = comm.rank == 0 or draft_comm.size > 1
        self.sources = find(config.drafter, self.files.name, progress) if takes_part else []
        if comm.rank == 0:
            check_speculation(config.speculation, self.sources)
        self._drafts: list[LoadedDraft] = [
            load_draft(source, self.target, self.platform, config, progress, draft_comm)
            for source in self.sources
            if source.kind.needs_files and (comm.rank == 0 or source.kind.sharded)
        ]
        self._make_graphs = graph_backend(config.enforce_eager, self.platform.attention, self.platform.device)
        self._graph_memory = self._num_blocks = 0
        self._lead: Callable[[int], Lead] | None = None
        self.runner: ModelRunner
        """The target's, once `allocate` was called."""
        self.sharded: list[ModelRunner] = []
        """The runners of all sharded models, in the order in which passes number them; the target's is the first."""
        self.drafters: list[ModelDrafter] = []

    @property
    def captures(self) -> bool:
        """Whether passes are captured on this device."""
        return self._make_graphs is not None

    @property
    def padding(self) -> int:
        """Blocks of every cache that are no sequence's, behind those that are: captured passes are padded into them."""
        return int(self.captures)

    def room(self) -> CacheRoom:
        """What is free for caches on this rank once its weights are loaded, and what a block of all of them takes:
        the target's block comes with one of each draft's, so that all caches hold the same number of tokens."""
        free = free_memory(self.platform.device)
        if self.captures:
            self._graph_memory = self.config.cuda_graph_memory or int(GRAPH_SHARE * free)
        shapes = [(self.target.config, self.target.comm.size), *((draft.shape, draft.ranks) for draft in self._drafts)]
        sizes = [
            kv_cache.block_bytes(shape, self.config.block_size, self.platform.cache_dtype, ranks)
            for shape, ranks in shapes
        ]
        return CacheRoom(free - self._graph_memory, sum(sizes))

    def allocate(self, num_blocks: int, lead: Callable[[int], Lead] | None = None) -> None:
        """Allocate caches of `num_blocks` blocks for sequences, and make the runners and drafters. `lead` makes rank
        0's Lead of the sharded model of this number."""
        self._num_blocks, self._lead = num_blocks, lead
        self.runner = self._runner(self.target, self._caches(self.target.config, self.target.comm.size))
        self.drafters = [
            draft.make(
                self.target.config,
                self.config,
                self._caches(draft.shape, draft.ranks),
                num_blocks,
                self.platform.device,
                self._runner,
            )
            for draft in self._drafts
        ]

    def capture(self, max_model_len: int) -> None:
        """Capture the passes of all models, if any are captured here; other ranks do so at the same time."""
        if self._make_graphs is None:
            return
        config = self.config
        backend = self._make_graphs()

        def planned(lengths: tuple[int, ...]) -> GraphPlan:
            return GraphPlan(
                backend=backend,
                buckets=buckets(batch_sizes(config.max_num_seqs), lengths, config.max_batch_tokens),
                max_len=max_model_len,
                padding_block=self._num_blocks,
                memory=self._graph_memory,
            )

        feature_layers = FeatureRouter(self.drafters).layers
        self.runner.capture("target", planned(span_lengths(config.num_draft_tokens)), feature_layers)
        for drafter in self.drafters:
            drafter.capture(planned)

    def _runner(self, model: DecoderModel, caches: list[LayerCache]) -> ModelRunner:
        sharded = model.comm.size > 1
        lead = self._lead(len(self.sharded)) if self._lead and sharded else None
        runner = ModelRunner(model, caches, self.config.block_size, self.platform.device, lead)
        if sharded:
            self.sharded.append(runner)
        return runner

    def _caches(self, shape: ModelConfig, ranks: int) -> list[LayerCache]:
        platform = self.platform
        blocks = self._num_blocks + self.padding
        return kv_cache.allocate(
            shape, platform.attention, blocks, platform.block_size, platform.cache_dtype, platform.device, ranks
        )
