"""Drafting with a small model of the same vocabulary (arXiv 2211.17192, 2302.01318).

The draft model runs through the same ModelRunner, on the same kinds of span, batched over sequences. It has its own
block pool and KV cache, so that nothing that happens there touches the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from pilotfish.checkpoints.catalog import ModelFiles, Progress
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.draft_steps import DraftSteps
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import CausalModel, DecoderModel
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, LoadedDraft, MakeRunner, check_vocabulary
from pilotfish.engine.speculation.drafters.growth import GrowingDraft, Growth, SeveralPasses, finished, longest


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
    model, _, _ = load_model(str(files.path), platform, config, target.config.max_position, progress, comm)
    check_vocabulary(name, model.config, target.config)
    return LoadedDraft(name, model, model.config, partial(_make, name, model), model.comm.size)


def _make(
    name: str,
    model: DecoderModel,
    target: ModelConfig,
    config: EngineConfig,
    caches: list[LayerCache],
    num_blocks: int,
    device: torch.device,
    make_runner: MakeRunner,
) -> DraftModelDrafter:
    pool = BlockPool(num_blocks, config.block_size, config.prefix_caching)
    runner, keep_probs = make_runner(model, caches), config.verification == "rejection"
    return DraftModelDrafter(name, runner, pool, target.eos_token_ids, config.max_batch_tokens, keep_probs)


@dataclass(slots=True)
class _Cached:
    """A sequence's part of the draft model's KV cache: its first `committed` tokens, then the `drafted` ones."""

    blocks: BlockTable
    committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def catch_up(self, tokens: list[int]) -> int:
        """Keep what is still valid now that the sequence is `tokens`, and return how many of them are cached."""
        for token in self.drafted:
            if self.committed >= len(tokens) or tokens[self.committed] != token:
                break
            self.committed += 1
        self.drafted = []
        self.committed = min(self.committed, len(tokens) - 1)  # the last one's logits are needed
        return self.committed


class DraftModelDrafter:
    """Drafts with a draft model. `keep_probs` and `sync_free` are as in `Growth`; by default drafts grow sync-free
    unless the device is the CPU.

    A call reads at most `max_batch_tokens` rows of backlog: a sequence with a long prompt gets no draft until the draft
    model has read it, chunk by chunk.
    """

    def __init__(
        self,
        name: str,
        runner: ModelRunner,
        pool: BlockPool,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        keep_probs: bool = False,
        sync_free: bool | None = None,
    ) -> None:
        self.name = name
        self.passes: tuple[int, ...] = ()
        self.block = 0
        if sync_free is None:
            sync_free = runner.device.type != "cpu"
        self.growth = Growth(eos_token_ids, keep_probs, sync_free)
        self._runner = runner
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._cached: dict[str, _Cached] = {}
        self._steps: DraftSteps | None = None

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        asked = {request.sequence.id for request in requests}
        spans: list[Span] = []
        read: list[tuple[_Cached, list[int]]] = []
        growing: dict[str, GrowingDraft] = {}
        budget = self._max_batch_tokens
        for request in requests:
            cached = self._reserved(request, asked)
            if cached is None or budget <= 0:
                continue
            tokens, start = request.sequence.tokens, cached.committed
            stop = min(len(tokens), start + budget)
            budget -= stop - start
            complete = stop == len(tokens)
            spans.append(Span(tokens[start:stop], start, cached.blocks.blocks, logit_rows=int(complete)))
            cached.committed = stop
            read.append((cached, tokens))
            if complete:
                growing[request.sequence.id] = GrowingDraft(request, cached.blocks, start=len(tokens))
        self.passes = ()
        if spans:
            logits = self._runner.run(spans)
            for cached, tokens in read:  # only now are they in the cache
                cached.blocks.commit(tokens, cached.committed)
            several = SeveralPasses(self._steps) if self._steps is not None else None
            later = self.growth.grow(logits, list(growing.values()), self._next_pass, several)
            self.passes = (sum(len(span.token_ids) for span in spans), *later)
        for identity, draft in growing.items():
            self._cached[identity].drafted = draft.computed
        return finished(requests, growing, self.name)

    def _next_pass(self, spans: list[Span], kept: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
        return self._runner.run(spans, token_ids=tokens)

    def backlog(self, sequence: Sequence) -> int:
        """Return the tokens of the sequence that are not in the draft model's cache: at least the last one."""
        cached = self._cached.get(sequence.id)
        return len(sequence.tokens) - (cached.catch_up(sequence.tokens) if cached is not None else 0)

    def try_pass(self, rows: int) -> None:
        """Compute a pass over one span of `rows` rows, in the cache's first blocks: only before there are sequences."""
        self._runner.run([replace(span, logit_rows=1) for span in self._runner.trial(rows)])

    def capture(self, planned: Callable[[], GraphPlan]) -> None:
        self._runner.capture(self.name, planned())
        if self.growth.drafts_ahead and self._runner.model.comm.size == 1:
            self._steps = self._runner.capture_steps(self.name, planned(), longest(planned()))

    def release(self, sequence: Sequence) -> None:
        cached = self._cached.pop(sequence.id, None)
        if cached is not None:
            cached.blocks.release()

    def _reserved(self, request: DraftRequest, asked: set[str]) -> _Cached | None:
        """Return the sequence's cache with room for its tokens and the draft; None if there is no room."""
        tokens = request.sequence.tokens
        cached = self._cached.get(request.sequence.id)
        if cached is None:
            table = BlockTable(self._pool, request.sequence.request.salt)
            cached = self._cached[request.sequence.id] = _Cached(table)
            cached.committed = cached.blocks.claim_prefix(tokens)
        cached.catch_up(tokens)
        # The last drafted token is never run.
        length = len(tokens) + request.limit - 1
        if cached.blocks.reserve(length):
            return cached
        for identity in [identity for identity in self._cached if identity not in asked]:  # not decoding at present
            self._cached.pop(identity).blocks.release()
        if cached.blocks.reserve(length):
            return cached
        self.release(request.sequence)
        return None
