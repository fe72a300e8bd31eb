"""Drafting with an EAGLE-3 head, which reads the target's hidden states (arXiv 2503.01840).

Row 0 of the head's KV cache is the first position that it has features for: there are none for a prefix from the
target's prefix cache, and the head does without. Rotary embedding is relative, so it does not matter where a sequence's
rows begin.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch

from pilotfish.checkpoints.catalog import ModelFiles, Progress
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.draft_steps import DraftSteps
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.loader import load_shared
from pilotfish.engine.execution.platform import Platform, check_draft
from pilotfish.engine.execution.runner import HeadRunner
from pilotfish.engine.execution.whole_drafts import WantedDraft, WholeDrafts
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models import eagle3_checkpoint
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import CausalModel
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.sampling.processors import temperature_of
from pilotfish.engine.sampling.sampler import argmax
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest, LoadedDraft, MakeRunner, check_vocabulary
from pilotfish.engine.speculation.drafters.feature_backlog import MOST_PENDING, FeatureBacklog, with_hidden_states
from pilotfish.engine.speculation.drafters.growth import (
    Carried,
    GrowingDraft,
    Growth,
    SeveralPasses,
    finished,
    longest,
)
from pilotfish.errors import ConfigError


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
    target = with_hidden_states(name, target)
    shape = eagle3_checkpoint.read_config(files.path)
    check_draft(platform, name, shape.decoder, config)
    check_vocabulary(name, shape.decoder, target.config)
    eagle3_checkpoint.check_target(name, shape, target.config)
    weights = eagle3_checkpoint.read_weights(files.path, shape, platform.dtype)
    embedding, head = (part not in weights for part in ("embed_tokens.weight", "lm_head.weight"))
    if embedding and shape.decoder.hidden_size != target.config.hidden_size:
        raise ConfigError(f"drafter {name!r} has no embedding of its own, and the target's is of another size")
    shared = load_shared(target, platform, config, embedding, head, progress)
    with torch.inference_mode():
        model = Eagle3Model(
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
    # The head is whole, beside the target's first shard.
    return LoadedDraft(name, model, shape.decoder, partial(_make, name, model))


def _make(
    name: str,
    model: Eagle3Model,
    target: ModelConfig,
    config: EngineConfig,
    caches: list[LayerCache],
    num_blocks: int,
    device: torch.device,
    make_runner: MakeRunner,
) -> Eagle3Drafter:
    return Eagle3Drafter(
        name,
        HeadRunner(model, caches[0], config.block_size, device),
        model.config.features_of(target),
        # No prefix caching: what a block holds depends on more than its tokens.
        BlockPool(num_blocks, config.block_size, False),
        target.eos_token_ids,
        config.max_batch_tokens,
        keep_probs=config.verification == "rejection",
    )


class Eagle3Drafter:
    """Drafts with an EAGLE-3 head. `keep_probs` and `sync_free` are as in `DraftModelDrafter`."""

    def __init__(
        self,
        name: str,
        runner: HeadRunner,
        feature_layers: tuple[int, ...],
        pool: BlockPool,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        keep_probs: bool = False,
        sync_free: bool | None = None,
    ) -> None:
        self.name = name
        self.feature_layers = feature_layers
        self.passes: tuple[int, ...] = ()
        self.block = 0
        if sync_free is None:
            sync_free = runner.device.type != "cpu"
        self._model = model = runner.model
        self.growth = Growth(eos_token_ids, keep_probs, sync_free, model.config.decoder.vocab_size, model.target_ids)
        self._runner = runner
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._known: dict[str, FeatureBacklog] = {}
        self._steps: DraftSteps | None = None
        self._whole = None if keep_probs or self.growth.sync_free else runner.whole_drafts()

    def backlog(self, sequence: Sequence) -> int:
        """Return the rows that a draft's first pass has to read; 0 if the head has no features of the sequence."""
        known = self._known.get(sequence.id)
        return 0 if known is None else known.rows_pending

    def try_pass(self, rows: int) -> None:
        """Compute a pass over `rows` rows, each a span of its own. What it writes to the cache is never read."""
        hidden = torch.zeros(rows, self._model.config.decoder.hidden_size, device=self._runner.device)
        _, logits = self._runner.run([Span([0], 0, [0], 1)] * rows, hidden.to(self._model.dtype))
        argmax(logits)

    def capture(self, planned: Callable[[], GraphPlan]) -> None:
        self._runner.capture(self.name, planned())
        if self.growth.drafts_ahead:
            self._steps = self._runner.capture_steps(
                self.name, planned(), longest(planned()), self._model.config.decoder.vocab_size
            )

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        """See `FeatureReader.observe_features`."""
        known = self._known.get(sequence.id)
        if known is None:
            blocks = BlockTable(self._pool, sequence.request.salt)
            known = self._known[sequence.id] = FeatureBacklog(blocks, first=start)
        if known.observe(start, features):
            known.drop(MOST_PENDING)

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty while the head has not read the whole prompt."""
        spans: list[Span] = []
        features: list[torch.Tensor] = []
        begun: list[GrowingDraft | None] = []  # by each of the spans
        budget = self._max_batch_tokens
        for request in requests:
            known = self._known.get(request.sequence.id)
            tokens = request.sequence.tokens
            if known is None or not known.rows_pending or budget <= 0:
                continue
            if not known.blocks.reserve(len(tokens) - 1 - known.first + request.limit):
                continue
            count = min(known.rows_pending, budget)
            budget -= count
            position = known.first + known.computed
            complete = count == known.rows_pending and position + count == len(tokens) - 1
            # Row t has the token at t + 1.
            spans.append(
                Span(tokens[position + 1 : position + 1 + count], known.computed, known.blocks.blocks, int(complete))
            )
            features += known.take(count)
            begun.append(GrowingDraft(request, known.blocks, start=known.computed) if complete else None)
        growing = {draft.request.sequence.id: draft for draft in begun if draft is not None}
        self.passes = ()
        if spans:
            rows, read = (
                sum(len(span.token_ids) for span in spans),
                torch.cat(features) if len(features) > 1 else features[0],
            )
            if self._whole is not None and all(draft.keyed for draft in growing.values()):
                self.passes = (rows, *_grow_whole(self._whole, spans, read, begun))
                return finished(requests, growing, self.name)
            fused = self._model.fuse(read)
            out, logits = self._runner.run(spans, fused)
            carried = Carried(out)

            def next_pass(spans: list[Span], kept: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
                carried.hidden, logits = self._runner.run(spans, carried.rows(kept), tokens)
                return logits

            several = SeveralPasses(self._steps, carried) if self._steps is not None else None
            later = self.growth.grow(logits, list(growing.values()), next_pass, several)
            self.passes = (rows, *later)
        return finished(requests, growing, self.name)

    def release(self, sequence: Sequence) -> None:
        known = self._known.pop(sequence.id, None)
        if known is not None:
            known.blocks.release()


def _grow_whole(
    whole: WholeDrafts, spans: list[Span], features: torch.Tensor, begun: Seq[GrowingDraft | None]
) -> list[int]:
    """Grow the drafts that the spans begin, and return the rows of each pass after the first."""
    found, passes = whole.grow(spans, features, [None if draft is None else _wanted(draft) for draft in begun])
    for draft, grown in zip(begun, found, strict=True):
        if draft is not None:
            draft.tokens, draft.confidences, draft.computed = grown.tokens, grown.chances, grown.tokens[:-1]
    return passes


def _wanted(draft: GrowingDraft) -> WantedDraft:
    request, params = draft.request, draft.request.sequence.params
    temperature = 0.0 if params.greedy else temperature_of(params)
    sequence = request.sequence
    return WantedDraft(request.limit, request.floor, len(sequence.tokens), sequence.seed, temperature)
