"""BlockRunner runs a block drafter: it reads the target's features into the drafter's cache, and computes blocks of
rows that see each other. Blocks replay a captured pass if there is one for the batch (`graphs`); reading is eager."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pilotfish.engine.execution.batch import FlatBatch, Span, pack
from pilotfish.engine.execution.graphs import GraphedPasses, GraphPlan, PassOutputs
from pilotfish.engine.layers.attention.backend import LayerCache
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.models.dflash import DFlashModel


class BlockRunner:
    """The results of `run` are valid until the next `run`."""

    def __init__(self, model: DFlashModel, caches: list[LayerCache], block_size: int, device: torch.device) -> None:
        self.model, self.block_size, self.device = model, block_size, device
        self._caches = caches
        self._graphs: GraphedPasses | None = None

    @torch.inference_mode()
    def capture(self, name: str, plan: GraphPlan) -> None:
        """Capture the plan's passes of blocks. Causal layers stay eager: a captured pass also has other rows than whole
        blocks."""
        if self.model.has_causal_layers:
            return

        def function(batch: FlatBatch, inputs: Seq[torch.Tensor]) -> PassOutputs:
            return PassOutputs(self._compute(batch))

        self._graphs = GraphedPasses(name, function, plan, self.block_size, self.device, ALONE)

    @torch.inference_mode()
    def read(self, spans: Seq[Span], features: torch.Tensor) -> None:
        """Write the keys and values of the spans' positions, whose rows have these features, (rows, feature layers *
        target_hidden_size), to the cache. The spans' tokens do not matter."""
        batch = pack(spans, self.block_size).to(self.device)
        self.model.read(features, batch.arrays.positions, batch.attention, self._caches)

    @torch.inference_mode()
    def run(self, spans: Seq[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute blocks, whose rows are a span each: the hidden states of the rows whose logits are wanted, and the
        logits, (wanted rows, hidden_size) and (wanted rows, draft_vocab_size)."""
        host = pack(spans, self.block_size)
        if self._graphs is not None and (bucket := self._graphs.find(host)) is not None:
            (hidden, logits), _ = self._graphs.run(bucket, host)
            return hidden[: host.shape.wanted], logits[: host.shape.wanted]
        return self._compute(host.to(self.device))

    def _compute(self, batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = batch.arrays
        hidden = self.model.forward(arrays.token_ids, arrays.positions, batch.attention, self._caches)
        wanted = hidden.index_select(0, arrays.logit_rows)
        return wanted, self.model.logits(wanted)
