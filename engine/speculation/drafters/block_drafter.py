"""BlockDrafter drafts with a model that computes a block of tokens in one pass, from the target's features.

What its cache holds of a position depends on the target's features there alone, and so on the text up to it: prefixes
are shared as the target's are, and a prompt from the target's prefix cache is drafted from as if it had been read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.block_runner import BlockRunner
from pilotfish.engine.execution.graphs import GraphPlan
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.features import FeatureRows
from pilotfish.engine.sampling.sampler import argmax
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.block_growth import grow_block, grow_chain
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.feature_backlog import MOST_PENDING, FeatureBacklog
from pilotfish.engine.speculation.drafters.growth import GrowingDraft, Growth, finished


class BlockDrafter:
    """`keep_probs` and `sync_free` are as in `DraftModelDrafter`."""

    def __init__(
        self,
        name: str,
        runner: BlockRunner,
        pool: BlockPool,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        keep_probs: bool = False,
        sync_free: bool | None = None,
    ) -> None:
        self.name = name
        self._model, self._runner, self._pool = runner.model, runner, pool
        self._config = config = runner.model.config
        self.feature_layers = config.feature_layers
        self.passes: tuple[int, ...] = ()
        self.block = config.block_size
        if sync_free is None:
            sync_free = runner.device.type != "cpu"
        self.growth = Growth(eos_token_ids, keep_probs, sync_free, config.decoder.vocab_size, runner.model.target_ids)
        self._max_batch_tokens = max_batch_tokens
        self._known: dict[str, FeatureBacklog] = {}

    def backlog(self, sequence: Sequence) -> int:
        """Return the rows of a draft's pass: the block, and what is to be read before; 0 if it has no features of the
        sequence."""
        known = self._known.get(sequence.id)
        return 0 if known is None else self._config.block_size + self._read(known.rows_pending)

    def try_pass(self, rows: int) -> None:
        """Compute a pass over `rows` rows. What it writes to the cache is never read."""
        _, logits = self._runner.run(
            [Span([self._config.mask_token_id], 0, [0], 1, sees=self._config.block_size)] * rows
        )
        argmax(logits)

    def capture(self, planned: Callable[[], GraphPlan]) -> None:
        self._runner.capture(self.name, planned())

    def observe_features(self, sequence: Sequence, start: int, features: FeatureRows) -> None:
        """See `FeatureReader.observe_features`."""
        known = self._known.get(sequence.id)
        if known is None:
            known = self._known[sequence.id] = FeatureBacklog(BlockTable(self._pool, sequence.request.salt))
            known.computed = known.blocks.claim_prefix(sequence.tokens[: start + 1])
            if known.computed < start:  # the target's prefix cache has more of it
                known.forget(start)
        if known.observe(start, features) and known.rows_pending > MOST_PENDING:
            self._catch_up(sequence, known)

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        """Return one Draft for each of `requests`, empty while not all of the text has been read."""
        config, budget = self._config, self._max_batch_tokens
        reading: list[Span] = []
        features: list[torch.Tensor] = []
        read: list[tuple[FeatureBacklog, Sequence]] = []
        growing: dict[str, GrowingDraft] = {}
        for request in requests:
            sequence, known = request.sequence, self._known.get(request.sequence.id)
            last = len(sequence.tokens) - 1
            if known is None or budget <= 0 or not known.blocks.reserve(last - known.first + config.block_size):
                continue
            if count := min(known.rows_pending, budget):
                budget -= count
                reading.append(_context_span(known, count))
                features += known.take(count)
                read.append((known, sequence))
            if not known.rows_pending and known.end == last:
                own = replace(request, limit=min(request.limit, config.length))
                growing[sequence.id] = GrowingDraft(own, known.blocks, start=known.computed)
        if reading:
            self._runner.read(reading, torch.cat(features) if len(features) > 1 else features[0])
            for known, sequence in read:
                _share(known, sequence)
        if growing:
            self._grow(list(growing.values()))
        rows = len(growing) * config.block_size + self._read(sum(len(span.token_ids) for span in reading))
        self.passes = (rows,) if rows else ()
        return finished(requests, growing, self.name)

    def release(self, sequence: Sequence) -> None:
        known = self._known.pop(sequence.id, None)
        if known is not None:
            known.blocks.release()

    def _grow(self, drafts: list[GrowingDraft]) -> None:
        positions = max(draft.request.limit for draft in drafts)
        hidden, logits = self._runner.run([span for draft in drafts for span in self._block(draft, positions)])
        hidden, logits = hidden.view(len(drafts), positions, -1), logits.view(len(drafts), positions, -1)
        if self._model.heads is None:
            grow_block(self.growth, logits, drafts)
        else:
            grow_chain(self.growth, self._model.heads, hidden, logits, drafts)

    def _block(self, draft: GrowingDraft, positions: int) -> list[Span]:
        """The block's rows, the first `positions` of which that draft have logits."""
        config, start = self._config, draft.start
        first = int(not config.first_drafts)
        tokens = [draft.request.sequence.tokens[-1]] + [config.mask_token_id] * (config.block_size - 1)
        return [
            Span([token], start + i, draft.blocks.blocks, int(first <= i < first + positions), sees=start + len(tokens))
            for i, token in enumerate(tokens)
        ]

    def _catch_up(self, sequence: Sequence, known: FeatureBacklog) -> None:
        """Read what is pending, so that no more is kept. Without room for it, what is furthest back is lost."""
        if not known.blocks.reserve(known.computed + known.rows_pending):
            known.drop(MOST_PENDING)
            return
        while known.rows_pending:
            count = min(known.rows_pending, self._max_batch_tokens)
            span, features = _context_span(known, count), known.take(count)
            self._runner.read([span], torch.cat(features) if len(features) > 1 else features[0])
        _share(known, sequence)

    def _read(self, rows: int) -> int:
        """Return the rows of a block that take as long as reading the features of so many positions."""
        return -(-rows * self._model.reading // 100)


def _context_span(known: FeatureBacklog, count: int) -> Span:
    """The first `count` positions with pending features."""
    return Span([0] * count, known.computed, known.blocks.blocks)


def _share(known: FeatureBacklog, sequence: Sequence) -> None:
    """Let others find what has been read, if it begins the text."""
    if known.first == 0:
        known.blocks.commit(sequence.tokens, known.computed)
