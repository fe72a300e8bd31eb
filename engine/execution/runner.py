"""Runners: spans in, logits out. ModelRunner runs the target or a draft model, HeadRunner an EAGLE-3 head, which also
reads hidden states. Both replay a captured pass if there is one for the batch (`graphs`), and else compute eagerly."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pilotfish.engine.device.transfer import arrays_to_device
from pilotfish.engine.execution.batch import FlatBatch, HostBatch, Span, pack
from pilotfish.engine.execution.draft_steps import DraftSteps, DrawKeyed
from pilotfish.engine.execution.graphs import GraphedPasses, GraphPlan, PassOutputs
from pilotfish.engine.execution.whole_drafts import WholeDrafts, whole_drafts
from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.models.decoder_model import CausalModel
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.sampling.device_sampler import draw_keyed

CAPTURED = "captured"
NO_GRAPHS = "no_graphs"
"""Nothing was captured, or not with these features."""


class Lead(Protocol):
    """Makes the other ranks of a sharded model do what rank 0 does, at the same time."""

    def capturing(self, name: str) -> AbstractContextManager[None]:
        """Held while the passes of this model are captured."""
        ...

    def computing(self, host: HostBatch) -> AbstractContextManager[None]:
        """Held while a pass over this batch is computed. Raises RankError if a rank has failed."""
        ...


@dataclass(slots=True)
class DrawnTokens:
    """Takes the tokens that a pass has drawn, one for each row whose logits are wanted, as `Span.draw` says."""

    tokens: torch.Tensor | None = None
    """(rows,) int64 on the device; valid until the next pass."""


def drawing_of(kernels: Kernels[Any]) -> DrawKeyed:
    if isinstance(kernels, TorchKernels) and kernels.draws:
        from pilotfish.engine.kernels.triton import race

        return race
    return draw_keyed


class ModelRunner:
    """Runs a model over spans. The result of `run` is valid until the next `run`; features in a tap are the caller's.

    `lead` is given on rank 0 of a sharded model alone; it sends every batch to the other ranks.
    """

    def __init__(
        self,
        model: CausalModel,
        caches: list[LayerCache],
        block_size: int,
        device: torch.device,
        lead: Lead | None = None,
        draw: DrawKeyed = draw_keyed,
    ) -> None:
        self.model: CausalModel = model
        self.block_size = block_size
        self.device = device
        self._caches = caches
        self._lead = lead
        self._graphs: GraphedPasses | None = None
        self._captured_layers: tuple[int, ...] = ()
        self._draw = draw
        self._captured_draws = False
        self.how = NO_GRAPHS
        """How the last pass was computed: "captured", or why it was not."""

    @torch.inference_mode()
    def capture(self, name: str, plan: GraphPlan, feature_layers: tuple[int, ...] = (), draws: bool = False) -> None:
        """Capture the plan's passes. `feature_layers` are those of the taps given to `run`, and `draws` is whether
        tokens are to be drawn in them, on rank 0 only. All ranks of a sharded model capture at the same time."""

        def function(batch: FlatBatch, inputs: Seq[torch.Tensor]) -> PassOutputs:
            arrays = batch.arrays
            tap = FeatureTap(feature_layers) if feature_layers else None
            hidden = self.model.forward(arrays.token_ids, arrays.positions, batch.attention, self._caches, tap)
            logits = self.model.logits(hidden.index_select(0, arrays.logit_rows))
            wanted = (logits, self._draw(logits, arrays.draw_keys, arrays.temperatures)) if draws else (logits,)
            return PassOutputs(wanted, () if tap is None or tap.features is None else (tap.features,))

        self._captured_layers, self._captured_draws = feature_layers, draws
        with self._lead.capturing(name) if self._lead else nullcontext():
            self._graphs = GraphedPasses(name, function, plan, self.block_size, self.device, self.model.comm)

    @property
    def most_spans(self) -> int:
        """Sequences of the largest captured pass; 1 where none is captured."""
        return max((bucket.spans for bucket in self._graphs.captured), default=1) if self._graphs else 1

    @property
    def draws(self) -> bool:
        """Whether passes can draw tokens without the host: on a GPU, and where captured passes do."""
        return self._captured_draws or self.device.type == "cuda"

    def run(
        self,
        spans: Seq[Span],
        tap: FeatureTap | None = None,
        token_ids: torch.Tensor | None = None,
        drawn: DrawnTokens | None = None,
    ) -> torch.Tensor:
        """Compute the spans in one pass; afterwards their keys and values are in the cache, all rows' features in
        `tap`, and tokens in `drawn`. For `token_ids` see `run_batch`.

        Returns the logits of each span's last `logit_rows` rows, spans in order: (sum of logit_rows, vocab_size), in
        the model's dtype.
        """
        return self.run_batch(pack(spans, self.block_size), tap, token_ids, drawn)

    @torch.inference_mode()
    def run_batch(
        self,
        host: HostBatch,
        tap: FeatureTap | None = None,
        token_ids: torch.Tensor | None = None,
        drawn: DrawnTokens | None = None,
    ) -> torch.Tensor:
        """As `run`, of packed spans. `token_ids`, (rows,) int64 on the device, replace those of a batch with one row
        per span: tokens that the host has not seen. (With a `lead` the host waits for them, to send them.)"""
        if self._lead is None:
            return self._compute(host, tap, token_ids, drawn)
        if token_ids is not None:
            host.arrays.token_ids[:] = token_ids.cpu().numpy()
        with self._lead.computing(host):
            return self._compute(host, tap, None, drawn)

    def _compute(
        self, host: HostBatch, tap: FeatureTap | None, token_ids: torch.Tensor | None, drawn: DrawnTokens | None
    ) -> torch.Tensor:
        replayable = tap is None or tap.layers == self._captured_layers
        self.how = "adapters" if host.adapted else NO_GRAPHS
        if self._graphs is not None and replayable and not host.adapted:
            bucket = self._graphs.find(host)
            self.how = CAPTURED if bucket is not None else self._graphs.why_not(host)
            if bucket is not None:
                (logits, *from_pass), features = self._graphs.run(bucket, host, (), token_ids)
                if tap is not None:
                    tap.features = features[0][: host.shape.rows].clone()
                logits = logits[: host.shape.wanted]
                if drawn is not None:
                    drawn.tokens = from_pass[0][: len(logits)] if from_pass else self._draw_eagerly(logits, host)
                return logits
        batch = host.to(self.device)
        tokens = batch.arrays.token_ids if token_ids is None else token_ids
        hidden = self.model.forward(tokens, batch.arrays.positions, batch.attention, self._caches, tap)
        if host.shape.wanted != host.shape.rows:
            hidden = hidden[batch.arrays.logit_rows]
        if not len(hidden):
            return hidden.new_empty(0, self.model.config.vocab_size)
        logits = self.model.logits(hidden)
        if drawn is not None:
            drawn.tokens = self._draw(logits, batch.arrays.draw_keys, batch.arrays.temperatures)
        return logits

    def _draw_eagerly(self, logits: torch.Tensor, host: HostBatch) -> torch.Tensor:
        keys, temperatures = arrays_to_device([host.arrays.draw_keys, host.arrays.temperatures], self.device)
        return self._draw(logits, keys, temperatures)

    def capture_steps(self, name: str, plan: GraphPlan, passes: int) -> DraftSteps:
        """Capture runs of up to `passes` passes over one row of each sequence, each of which draws the next's tokens:
        of a draft model that is not sharded."""

        def step(
            tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, _: torch.Tensor | None
        ) -> tuple[torch.Tensor, None]:
            return self.model.logits(self.model.forward(tokens, positions, batch, self._caches)), None

        with torch.inference_mode():
            return DraftSteps(name, step, self._draw, plan, passes, self.block_size, self.device)

    def trial(self, rows: int) -> list[Span]:
        """Spans of `rows` rows in all, to time a pass: as many as the largest captured pass has, or one. They use the
        cache's first blocks, so there must be no sequences. Their tokens differ, and so do the experts that they take:
        what a row costs depends on those of the others."""
        count = min(rows, self.most_spans)
        lengths = [rows // count + (i < rows % count) for i in range(count)]
        vocab = self.model.config.vocab_size
        return [
            Span(
                [(7919 * (97 * i + j) + 13) % vocab for j in range(length)],
                0,
                [0] * -(-length // self.block_size),
                length,
            )
            for i, length in enumerate(lengths)
        ]


class HeadRunner:
    """Runs an EAGLE-3 head. The result of `run` is valid until the next `run`."""

    def __init__(self, model: Eagle3Model, cache: LayerCache, block_size: int, device: torch.device) -> None:
        self.model = model
        self._cache = cache
        self.block_size = block_size
        self.device = device
        self._graphs: GraphedPasses | None = None

    def whole_drafts(self) -> WholeDrafts | None:
        """Return what grows the head's drafts in one call, where it can be done on this machine."""
        return whole_drafts(self.model, self._cache, self.block_size)

    @torch.inference_mode()
    def capture(self, name: str, plan: GraphPlan) -> None:
        """Capture the plan's passes."""

        def function(batch: FlatBatch, inputs: Seq[torch.Tensor]) -> PassOutputs:
            arrays = batch.arrays
            out = self.model.forward(inputs[0], arrays.token_ids, arrays.positions, batch.attention, self._cache)
            wanted = out.index_select(0, arrays.logit_rows)
            return PassOutputs((wanted, self.model.logits(wanted)))

        most = max(bucket.rows for bucket in plan.buckets)
        # Zeros, not uninitialised memory: rows of padding are computed, too.
        hidden = torch.zeros(most, self.model.config.decoder.hidden_size, dtype=self.model.dtype, device=self.device)
        self._graphs = GraphedPasses(name, function, plan, self.block_size, self.device, ALONE, (hidden,))

    @torch.inference_mode()
    def capture_steps(self, name: str, plan: GraphPlan, passes: int, vocab_size: int) -> DraftSteps:
        """As `ModelRunner.capture_steps`; tokens are of the target's vocabulary of this size."""
        model = self.model

        def step(
            tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, hidden: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert hidden is not None
            out = model.forward(hidden, tokens, positions, batch, self._cache)
            logits = model.logits(out)
            if model.target_ids is not None:
                whole = logits.new_full((len(logits), vocab_size), float("-inf"))
                logits = whole.index_copy_(1, model.target_ids, logits)
            return logits, out

        most = max(bucket.rows for bucket in plan.buckets)
        hidden = torch.zeros(most, model.config.decoder.hidden_size, dtype=model.dtype, device=self.device)
        draw = drawing_of(model.kernels)
        return DraftSteps(name, step, draw, plan, passes, self.block_size, self.device, hidden)

    @torch.inference_mode()
    def run(
        self, spans: Seq[Span], hidden: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's output and its logits, (sum of logit_rows, ...) each, of spans whose rows have these hidden
        states, (rows, hidden_size). For `token_ids` see ModelRunner.run_batch."""
        host = pack(spans, self.block_size)
        if self._graphs is not None and (bucket := self._graphs.find(host)) is not None:
            (out, logits), _ = self._graphs.run(bucket, host, (hidden,), token_ids)
            return out[: host.shape.wanted], logits[: host.shape.wanted]
        batch = host.to(self.device)
        tokens = batch.arrays.token_ids if token_ids is None else token_ids
        out = self.model.forward(hidden, tokens, batch.arrays.positions, batch.attention, self._cache)
        if host.shape.wanted != host.shape.rows:
            out = out[batch.arrays.logit_rows]
        if not len(out):
            return out, out.new_empty(0, self.model.config.draft_vocab_size)
        return out, self.model.logits(out)
