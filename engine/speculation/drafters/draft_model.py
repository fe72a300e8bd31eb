"""Drafting with a small model of the same vocabulary (arXiv 2211.17192, 2302.01318).

The draft runs through the same ModelRunner, on the same kinds of span, batched over the sequences. It has a block pool
and KV tensors of its own, so that whatever happens to a draft's cache never touches the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.buckets import DRAFT_LENGTHS
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.loader import Platform, Progress, load_model
from pilotfish.engine.execution.runner import Runner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.model import Model
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.processors import process
from pilotfish.engine.sampling.sampler import draw
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.chain import Chain, confident, knows_no_draft
from pilotfish.engine.speculation.drafters.drafter import NO_DRAFT, Draft, DraftRequest, check_vocabulary


@dataclass(frozen=True, slots=True)
class LoadedDraftModel:
    """As LoadedDraft."""

    name: str
    model: Model

    @property
    def shape(self) -> ModelConfig:
        return self.model.config

    @property
    def ranks(self) -> int:
        return self.model.comm.size

    @property
    def sharded_model(self) -> Model | None:
        return self.model if self.ranks > 1 else None

    def make(
        self,
        target: ModelConfig,
        config: EngineConfig,
        caches: list[LayerCache],
        num_blocks: int,
        device: torch.device,
        make_runner: Callable[[Model, list[LayerCache]], Runner],
    ) -> DraftModelDrafter:
        pool = BlockPool(num_blocks, config.block_size, config.prefix_caching)
        return DraftModelDrafter(
            self.name,
            make_runner(self.model, caches),
            pool,
            target.eos_token_ids,
            config.max_batch_tokens,
            keep_probs=config.verification == "rejection",
        )


def load(
    name: str,
    files: ModelFiles,
    target: Model,
    platform: Platform,
    config: EngineConfig,
    progress: Progress,
    comm: Communicator,
) -> LoadedDraftModel:
    """See `registry.load_draft`."""
    model, _, _ = load_model(str(files.path), platform, config, target.config.max_position, progress, comm)
    check_vocabulary(name, model.config, target.config)
    return LoadedDraftModel(name, model)


@dataclass(slots=True)
class _Cached:
    """What the draft's KV cache holds of a sequence: its first `committed` tokens, then `drafted` ones."""

    blocks: BlockTable
    committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def catch_up(self, tokens: list[int]) -> int:
        """Count what is still true now that the sequence is `tokens`; returns how many of them are cached."""
        for token in self.drafted:
            if self.committed >= len(tokens) or tokens[self.committed] != token:
                break
            self.committed += 1
        self.drafted = []
        self.committed = min(self.committed, len(tokens) - 1)  # the last one's logits are needed
        return self.committed


@dataclass(slots=True)
class _Drafting:
    """One sequence's draft while it grows."""

    request: DraftRequest
    cached: _Cached
    tokens: list[int] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    survival: float = 1.0
    """Product of the confidences."""

    @property
    def growing(self) -> bool:
        return len(self.tokens) < self.request.limit and self.survival >= self.request.floor

    def span(self) -> LogitSpan:
        return LogitSpan(self.request.sequence, tuple(self.tokens), rows=1)


class DraftModelDrafter:
    """`name`: as requests call it; an engine may have several. `keep_probs`: also return the distributions that the
    tokens were drawn from (rejection verification needs them).

    At most `max_batch_tokens` rows are caught up in a call: a sequence with a long prompt gets no draft until the draft
    model has read it, chunk by chunk.

    on_device: let drafts grow on the device and look at them once, at the end (see `chain`), where that can be: not
    with `keep_probs`, nor for penalties. By default so but on the CPU.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        pool: BlockPool,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        keep_probs: bool = False,
        on_device: bool | None = None,
    ) -> None:
        self.name = name
        self.passes: tuple[int, ...] = ()
        self._runner = runner
        self._pool = pool
        self._eos_token_ids = eos_token_ids
        self._max_batch_tokens = max_batch_tokens
        self._keep_probs = keep_probs
        self._on_device = runner.device.type != "cpu" if on_device is None else on_device
        self._cached: dict[str, _Cached] = {}

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        asked = {request.sequence.id for request in requests}
        active: list[_Drafting] = []
        spans: list[Span] = []
        read: list[tuple[_Cached, list[int]]] = []
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
                active.append(_Drafting(request, cached))
        finished = active
        passes = []
        while spans:
            passes.append(sum(len(span.token_ids) for span in spans))
            logits = self._runner.run(spans)
            while read:  # in the cache only now
                cached, tokens = read.pop()
                cached.blocks.commit(tokens, cached.committed)
            if self._on_device and not self._keep_probs and all(knows_no_draft(d.request.sequence) for d in active):
                self._grow(logits, active, passes)
                break
            self._draw(logits, active)
            active = [drafting for drafting in active if drafting.growing]
            spans = [self._next_span(drafting) for drafting in active]
        self.passes = tuple(passes)
        drafts = {
            drafting.request.sequence.id: Draft(
                tuple(drafting.tokens),
                torch.stack(drafting.probs) if drafting.probs else None,
                self.name,
                confidences=tuple(drafting.confidences),
            )
            for drafting in finished
        }
        return [drafts.get(request.sequence.id, NO_DRAFT) for request in requests]

    def backlog(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are not in the draft's cache, the last one at least."""
        cached = self._cached.get(sequence.id)
        return len(sequence.tokens) - (cached.catch_up(sequence.tokens) if cached is not None else 0)

    def try_pass(self, rows: int) -> None:
        """A pass over one span of so many rows, in the cache's first block: only while there are no sequences."""
        self._runner.run([replace(span, logit_rows=1) for span in self._runner.trial(rows)])

    def capture(self, planned: Callable[[tuple[int, ...]], GraphPlan]) -> None:
        self._runner.capture(self.name, planned(DRAFT_LENGTHS))

    def release(self, sequence: Sequence) -> None:
        cached = self._cached.pop(sequence.id, None)
        if cached is not None:
            cached.blocks.release()

    def _reserved(self, request: DraftRequest, asked: set[str]) -> _Cached | None:
        """The sequence's cache with room for its tokens and the draft; None if there is none to be had."""
        tokens = request.sequence.tokens
        cached = self._cached.get(request.sequence.id)
        if cached is None:
            cached = self._cached[request.sequence.id] = _Cached(BlockTable(self._pool))
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

    def _draw(self, logits: torch.Tensor, active: list[_Drafting]) -> None:
        if not active:
            return
        spans = [drafting.span() for drafting in active]
        processed = process(logits, spans, self._eos_token_ids)
        probs = torch.softmax(processed, dim=-1) if self._keep_probs else None
        tokens = draw(processed, spans)
        confidences = _probabilities(processed, tokens)
        for i, (drafting, token, confidence) in enumerate(zip(active, tokens, confidences, strict=True)):
            drafting.tokens.append(token)
            drafting.confidences.append(confidence)
            drafting.survival *= confidence
            if probs is not None:
                drafting.probs.append(
                    _certain(probs[i], token) if drafting.request.sequence.params.greedy else probs[i]
                )

    def _grow(self, logits: torch.Tensor, active: list[_Drafting], passes: list[int]) -> None:
        """All the passes of the drafts whose first tokens' logits these are, without a look at them in between."""
        chain = Chain([drafting.request for drafting in active])
        while chain.going:
            tokens, chances = chain.draw(logits, self._eos_token_ids)
            on = chain.add(tokens, chances)
            if not chain.going:
                break
            places = [(active[i], len(active[i].request.sequence.tokens) + chain.depth - 1) for i in chain.going]
            spans = [Span([0], place, drafting.cached.blocks.blocks, logit_rows=1) for drafting, place in places]
            passes.append(len(spans))
            logits = self._runner.run_on_device(spans, tokens if on is None else tokens.index_select(0, on))
        for drafting, (drafted, confidences) in zip(active, chain.read(), strict=True):
            drafting.cached.drafted = drafted[:-1]
            count = confident(confidences, drafting.request.floor)
            drafting.tokens, drafting.confidences = drafted[:count], confidences[:count]

    def _next_span(self, drafting: _Drafting) -> Span:
        token, cached = drafting.tokens[-1], drafting.cached
        place = len(drafting.request.sequence.tokens) + len(drafting.tokens) - 1
        cached.drafted.append(token)
        return Span([token], place, cached.blocks.blocks, logit_rows=1)


def _probabilities(processed: torch.Tensor, tokens: list[int]) -> list[float]:
    """Of each row's token, under the softmax of (rows, vocab): between 0 and 1."""
    drawn = processed[torch.arange(len(tokens)), torch.tensor(tokens)].float()
    chances: list[float] = (drawn - processed.float().logsumexp(dim=-1)).exp().clamp_(0.0, 1.0).tolist()
    return chances


def _certain(probs: torch.Tensor, token: int) -> torch.Tensor:
    """All probability on `token`, in the shape of `probs`."""
    return torch.zeros_like(probs).index_fill_(0, torch.tensor([token], device=probs.device), 1.0)
