"""Drafting with an EAGLE-3 head, which reads the target's hidden states (arXiv 2503.01840).

Rows of the head's KV cache are numbered as the sequence's positions, less those before the first that it has features
of: a prefix that came out of the target's prefix cache has none, and the head goes without. Rotary embedding is
relative, so it does not matter where a sequence's rows begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.buckets import span_lengths
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.execution.loader import Platform, Progress, check_draft, load_shared
from pilotfish.engine.execution.runner import HeadRunner, Runner
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import Communicator
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.models.model import Model
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.processors import process
from pilotfish.engine.sampling.sampler import argmax, draw
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.chain import Chain, confident, knows_no_draft
from pilotfish.engine.speculation.drafters.drafter import NO_DRAFT, Draft, DraftRequest, check_vocabulary
from pilotfish.engine.weights import eagle3
from pilotfish.errors import ConfigError

MOST_PENDING = 256
"""Positions whose features are kept for a sequence that is not drafted for. When it is again, they are read at once; of
a longer stretch only the last ones are, since a head that was told the target's features needs little more context."""


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """As LoadedDraft. Always whole on rank 0, beside the target's first shard."""

    name: str
    model: Eagle3Model
    ranks: int = 1
    sharded_model: Model | None = None

    @property
    def shape(self) -> ModelConfig:
        return self.model.config.decoder

    def make(
        self,
        target: ModelConfig,
        config: EngineConfig,
        caches: list[LayerCache],
        num_blocks: int,
        device: torch.device,
        make_runner: Callable[[Model, list[LayerCache]], Runner],
    ) -> Eagle3Drafter:
        return Eagle3Drafter(
            self.name,
            HeadRunner(self.model, caches[0], config.block_size, device),
            self.model.config.features_of(target),
            # No prefix caching: what a block holds depends on more than its tokens.
            BlockPool(num_blocks, config.block_size, False),
            target.eos_token_ids,
            config.max_batch_tokens,
            span_lengths(config.num_draft_tokens),
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
) -> LoadedHead:
    """See `registry.load_draft`."""
    shape = eagle3.read_config(files.path)
    check_draft(platform, name, shape.decoder, config)
    check_vocabulary(name, shape.decoder, target.config)
    _check_features(name, shape, target.config)
    weights = eagle3.read_weights(files.path, shape, platform.dtype)
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
    return LoadedHead(name, model)


def _check_features(name: str, head: Eagle3Config, target: ModelConfig) -> None:
    if head.target_hidden_size != target.hidden_size:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of size {head.target_hidden_size}, the target's are "
            f"{target.hidden_size}: it was made for another target"
        )
    layers = head.features_of(target)
    if max(layers) > target.num_layers:
        raise ConfigError(
            f"drafter {name!r} reads layers {layers}, the target has {target.num_layers}: it was made for another "
            "target"
        )


@dataclass(slots=True)
class _Known:
    """What the head knows of a sequence."""

    blocks: BlockTable
    first: int = 0
    """The position of its first row."""
    computed: int = 0
    """Its rows that are in the cache."""
    pending: deque[FeatureRows] = field(default_factory=deque)
    """Features of the positions from `first + computed` on, that are not."""
    rows_pending: int = 0

    @property
    def end(self) -> int:
        """The position after the last one that features are known of."""
        return self.first + self.computed + self.rows_pending

    def take(self, count: int) -> list[torch.Tensor]:
        """The first of the pending features, whose rows will be in the cache then."""
        self.computed += count
        self.rows_pending -= count
        taken: list[torch.Tensor] = []
        while count:
            rows = self.pending.popleft()
            if len(rows) > count:
                self.pending.appendleft(rows.behind(count))
            taken.append(rows.read()[:count])
            count -= len(taken[-1])
        return taken


class Eagle3Drafter:
    """`keep_probs`: also return the distributions that tokens were drawn from (rejection verification needs them).
    `on_device` as in DraftModelDrafter. `span_lengths`: tokens of a sequence in a pass that is captured."""

    def __init__(
        self,
        name: str,
        runner: HeadRunner,
        feature_layers: tuple[int, ...],
        pool: BlockPool,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        span_lengths: tuple[int, ...] = (1,),
        keep_probs: bool = False,
        on_device: bool | None = None,
    ) -> None:
        self.name = name
        self.feature_layers = feature_layers
        self._runner = runner
        self._model = model = runner.model
        self._pool = pool
        self._eos_token_ids = eos_token_ids
        self._max_batch_tokens = max_batch_tokens
        self._span_lengths = span_lengths
        self._keep_probs = keep_probs
        self._on_device = runner.device.type != "cpu" if on_device is None else on_device
        ids = model.target_ids
        self._target_ids: list[int] | None = None if ids is None else ids.tolist()
        self._known: dict[str, _Known] = {}
        self.passes: tuple[int, ...] = ()

    def backlog(self, sequence: Sequence) -> int:
        """Rows that a draft's first pass has to read; 0 where the head knows nothing of the sequence."""
        known = self._known.get(sequence.id)
        return 0 if known is None else known.rows_pending

    def try_pass(self, rows: int) -> None:
        """Compute a pass over so many rows, each a sequence's only one. What it writes to the cache nobody reads."""
        hidden = torch.zeros(rows, self._model.config.decoder.hidden_size, device=self._runner.device)
        _, logits = self._runner.run([Span([0], 0, [0], 1)] * rows, hidden.to(self._model.dtype))
        argmax(logits)

    def capture(self, planned: Callable[[tuple[int, ...]], GraphPlan]) -> None:
        self._runner.capture(self.name, planned(self._span_lengths))

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        """As FeatureReader's."""
        known = self._known.get(sequence.id)
        if known is None:
            known = self._known[sequence.id] = _Known(BlockTable(self._pool), first=start)
        end = start + len(features)
        if start > known.end:  # the target found what lies between in its cache
            self._forget(known, start)
        elif end <= known.end:  # computed anew, after a preemption
            return
        elif start < known.end:
            features = features.behind(known.end - start)
        known.pending.append(features)
        known.rows_pending += len(features)
        if (excess := known.rows_pending - MOST_PENDING) > 0:
            pending = known.pending
            while len(pending[0]) <= excess:
                excess -= len(pending.popleft())
            if excess:
                pending[0] = pending[0].behind(excess)
            self._forget(known, end - MOST_PENDING)
            known.pending, known.rows_pending = pending, MOST_PENDING

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """One Draft for each of `requests`; none for a sequence whose prompt the head has not read to its end."""
        active: list[_Drafting] = []
        spans: list[Span] = []
        features: list[torch.Tensor] = []
        budget = self._max_batch_tokens
        for request in requests:
            known = self._known.get(request.sequence.id)
            tokens = request.sequence.tokens
            if known is None or budget <= 0 or not self._reserve(known, len(tokens) - 1 - known.first + request.limit):
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
            if complete:
                active.append(_Drafting(request, known))
        passes = [sum(len(span.token_ids) for span in spans)]
        self.passes = ()
        if not spans:
            return [NO_DRAFT] * len(requests)
        hidden = self._model.fuse(torch.cat(features) if len(features) > 1 else features[0])
        drafted = active
        hidden, logits = self._runner.run(spans, hidden)
        if self._on_device and not self._keep_probs and all(knows_no_draft(each.request.sequence) for each in active):
            self._grow(hidden, logits, active, passes)
            active = []
        depth = 0
        while active:
            going = self._draw(logits, active)
            depth += 1
            if not going:
                break
            if len(going) < len(active):
                hidden = hidden[going]
            active = [active[i] for i in going]
            passes.append(len(active))
            spans = [
                Span([each.tokens[-1]], each.known.computed + depth - 1, each.known.blocks.blocks, 1) for each in active
            ]
            hidden, logits = self._runner.run(spans, hidden)
        self.passes = tuple(passes)
        drafts = {each.request.sequence.id: each.draft(self.name) for each in drafted}
        return [drafts.get(request.sequence.id, NO_DRAFT) for request in requests]

    def release(self, sequence: Sequence) -> None:
        known = self._known.pop(sequence.id, None)
        if known is not None:
            known.blocks.release()

    def _grow(self, hidden: torch.Tensor, logits: torch.Tensor, active: list[_Drafting], passes: list[int]) -> None:
        """All later passes of these drafts, without a look at their tokens in between."""
        chain = Chain([each.request for each in active])
        while chain.going:
            tokens, chances = self._draw_on_device(chain, logits, active)
            on = chain.add(tokens, chances)
            if not chain.going:
                break
            if on is not None:
                tokens, hidden = tokens.index_select(0, on), hidden.index_select(0, on)
            growing = [active[i].known for i in chain.going]
            spans = [Span([0], known.computed + chain.depth - 1, known.blocks.blocks, 1) for known in growing]
            passes.append(len(spans))
            hidden, logits = self._runner.run(spans, hidden, tokens)
        for each, (drafted, confidences) in zip(active, chain.read(), strict=True):
            count = confident(confidences, each.request.floor)
            each.tokens, each.confidences = drafted[:count], confidences[:count]

    def _draw_on_device(
        self, chain: Chain, logits: torch.Tensor, active: list[_Drafting]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not all(active[i].plain for i in chain.going):
            return chain.draw(self._whole(logits), self._eos_token_ids)
        columns = logits.argmax(1)
        tops = logits.gather(1, columns.unsqueeze(1)).squeeze(1)
        chances = (tops - torch.logsumexp(logits.float(), dim=1)).exp()
        ids = self._model.target_ids
        return columns if ids is None else ids.index_select(0, columns), chances

    def _draw(self, logits: torch.Tensor, active: list[_Drafting]) -> list[int]:
        """Append a token to each draft; returns which of them go on."""
        if not self._keep_probs and all(each.plain for each in active):
            columns = argmax(logits)
            tokens = columns if self._target_ids is None else [self._target_ids[column] for column in columns]
            tops = logits[range(len(columns)), columns]
            confidences = (tops - torch.logsumexp(logits.float(), dim=1)).exp().tolist()
        else:
            tokens, confidences = self._draw_processed(logits, active)
        going = []
        for i, (each, token, confidence) in enumerate(zip(active, tokens, confidences, strict=True)):
            each.tokens.append(token)
            each.confidences.append(confidence)
            each.chance *= confidence
            if len(each.tokens) < each.request.limit and each.chance >= each.request.floor:
                going.append(i)
        return going

    def _draw_processed(self, logits: torch.Tensor, active: list[_Drafting]) -> tuple[list[int], list[float]]:
        """As the target will draw: its processors, and the noise of each place."""
        logits = self._whole(logits)
        spans = [LogitSpan(each.request.sequence, tuple(each.tokens), rows=1) for each in active]
        processed = process(logits, spans, self._eos_token_ids)
        tokens = draw(processed, spans)
        probs = torch.softmax(processed.float(), dim=-1)
        if self._keep_probs:
            for each, row, token in zip(active, probs, tokens, strict=True):
                if each.request.sequence.params.greedy:
                    row = torch.zeros_like(row)
                    row[token] = 1.0
                each.probs.append(row)
        return tokens, probs[range(len(tokens)), tokens].tolist()

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Over the target's vocabulary: (rows, vocab), -inf for tokens that the head cannot say."""
        if self._model.target_ids is None:
            return logits
        whole = logits.new_full((len(logits), self._model.config.decoder.vocab_size), float("-inf"))
        return whole.index_copy_(1, self._model.target_ids, logits)

    def _reserve(self, known: _Known, rows: int) -> bool:
        return known.rows_pending > 0 and known.blocks.reserve(rows)

    def _forget(self, known: _Known, first: int) -> None:
        """Begin anew at position `first`."""
        known.blocks.release()
        known.first, known.computed, known.pending, known.rows_pending = first, 0, deque(), 0


@dataclass(slots=True)
class _Drafting:
    """One sequence's draft while it grows."""

    request: DraftRequest
    known: _Known
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    chance: float = 1.0
    """That all of them are right."""
    probs: list[torch.Tensor] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the raw logits is what the target will look for."""
        params = self.request.sequence.params
        return (
            params.greedy
            and not params.logit_bias
            and params.repetition_penalty == 1.0
            and params.presence_penalty == params.frequency_penalty == 0.0
        )

    def draft(self, name: str) -> Draft:
        return Draft(
            tuple(self.tokens),
            torch.stack(self.probs) if self.probs else None,
            name,
            confidences=tuple(self.confidences),
        )
