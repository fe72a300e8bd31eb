"""Several passes of a drafter's model in one captured graph: each draws the tokens that the next one reads.

Positions, slots and lengths advance on the device. A row whose draft is long enough stands still from then on: it is
computed, to no effect, and its keys and values go to the block that belongs to no sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pilotfish.engine.device.transfer import arrays_to_device
from pilotfish.engine.execution.batch import FlatBatch, Span, pack
from pilotfish.engine.execution.graphs import GraphedPasses, GraphPlan, PassOutputs
from pilotfish.engine.layers.attention.backend import AttentionBatch
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.sampling.device_sampler import chances_of
from pilotfish.engine.sampling.noise import row_keys
from pilotfish.engine.sampling.processors import scale_rows

MOST = 16
"""Most passes in a graph."""

Step = Callable[
    [torch.Tensor, torch.Tensor, AttentionBatch, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]
"""A pass over one row of each sequence: token ids, positions, batch and hidden states (of a head) -> logits over the
target's vocabulary, -inf for what the drafter does not know, and the hidden states of the next pass."""
DrawKeyed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`device_sampler.draw_keyed`, or a kernel in its place."""


class Grown(NamedTuple):
    """What several passes have drawn, on the device."""

    tokens: torch.Tensor  # (rows, passes) int64
    chances: torch.Tensor  # (rows, passes) float32
    hidden: torch.Tensor | None  # (rows, size): the input of the next pass


class Growing(NamedTuple):
    """A draft that is to grow by a row for each pass."""

    span: Span
    passes: int
    """How many of them count; at least 1."""
    seed: int
    position: int
    """Of the first token that is drawn, from the start of the prompt."""
    temperature: float


class DraftSteps:
    """The captured runs of 2, 4, 8, ... passes of one model. `hidden`: the static buffer of a head's hidden states,
    (most rows, size); None for models that read tokens alone."""

    def __init__(
        self,
        name: str,
        step: Step,
        draw: DrawKeyed,
        plan: GraphPlan,
        passes: int,
        block_size: int,
        device: torch.device,
        hidden: torch.Tensor | None = None,
    ) -> None:
        self._block_size, self._device = block_size, device
        self._graphs: dict[int, GraphedPasses] = {}
        # One row for each sequence, and a span for each row.
        plain = replace(plan, buckets=tuple(each for each in plan.buckets if each.length == 1 and not each.spare))
        most = max((bucket.rows for bucket in plain.buckets), default=0)
        count = 2
        while count <= min(passes, MOST):
            control = torch.zeros(most, 1 + count, dtype=torch.int64, device=device)
            inputs = (control,) if hidden is None else (control, hidden)
            function = _steps(step, draw, count, block_size, plan.padding_block)
            self._graphs[count] = GraphedPasses(
                f"{name}, {count} steps", function, plain, block_size, device, ALONE, inputs
            )
            count *= 2

    def count(self, rows: int, passes: int) -> int:
        """How many passes a run over so many rows takes, of `passes` that are wanted; 0: none is captured for it."""
        fitting = [
            count
            for count, graphs in self._graphs.items()
            if count <= passes and graphs.captured and graphs.captured[-1].rows >= rows
        ]
        return max(fitting, default=0)

    def run(self, count: int, drafts: Seq[Growing], tokens: torch.Tensor, hidden: torch.Tensor | None) -> Grown | None:
        """Run `count` passes, of which the first reads `tokens`, (rows,) int64 on the device. None if the batch fits no
        captured one. Results are valid until the next run."""
        graphs = self._graphs[count]
        host = pack([draft.span for draft in drafts], self._block_size, ahead=count)
        host.arrays.temperatures[:] = [draft.temperature for draft in drafts]
        if (bucket := graphs.find(host)) is None or bucket.length != 1:
            return None
        seeds = [draft.seed for draft in drafts for _ in range(count)]
        positions = np.array([[draft.position] for draft in drafts]) + np.arange(count)
        control = np.empty((len(drafts), 1 + count), dtype=np.int64)
        control[:, 0] = [draft.passes for draft in drafts]
        control[:, 1:] = row_keys(seeds, positions.reshape(-1)).reshape(len(drafts), count)
        (given,) = arrays_to_device([control], self._device)
        inputs = (given,) if hidden is None else (given, hidden)
        _, (drawn, chances, *last) = graphs.run(bucket, host, inputs, tokens)
        rows = len(drafts)
        return Grown(drawn[:rows], chances[:rows], last[0][:rows] if last else None)


def _steps(
    step: Step, draw: DrawKeyed, count: int, block_size: int, padding_block: int
) -> Callable[[FlatBatch, Seq[torch.Tensor]], PassOutputs]:
    def function(batch: FlatBatch, inputs: Seq[torch.Tensor]) -> PassOutputs:
        control, attention = inputs[0], batch.attention
        hidden = inputs[1] if len(inputs) > 1 else None
        tokens, positions, temperatures = batch.arrays.token_ids, batch.arrays.positions, batch.arrays.temperatures
        # Other rows are padding, of which `control` has what was there before.
        real = batch.arrays.slots < padding_block * block_size
        divisors = temperatures.masked_fill(temperatures == 0.0, 1.0).unsqueeze(1)
        drawn, chances = [], []
        for i in range(count):
            logits, hidden = step(tokens, positions, attention, hidden)
            tokens = draw(logits, control[:, 1 + i], temperatures)
            drawn.append(tokens)
            chances.append(chances_of(scale_rows(logits, divisors), tokens))
            if i + 1 < count:
                goes_on = real & (control[:, 0] > i + 1)
                positions = positions + goes_on
                attention = _advanced(attention, positions, goes_on, block_size, padding_block)
        found = torch.stack(drawn, 1), torch.stack(chances, 1)
        return PassOutputs((), found if hidden is None else (*found, hidden))

    return function


def _advanced(
    attention: AttentionBatch, positions: torch.Tensor, goes_on: torch.Tensor, block_size: int, padding_block: int
) -> AttentionBatch:
    """The batch at these positions, one row later where it goes on."""
    contexts = attention.context_lens + goes_on.to(torch.int32)
    ends = torch.cat((attention.cu_context_lens[:1], contexts.cumsum(0, dtype=torch.int32)))
    inside = torch.div(positions, block_size, rounding_mode="floor")
    blocks = attention.block_tables.gather(1, inside.unsqueeze(1)).squeeze(1).to(torch.int64)
    slots = blocks * block_size + (positions - inside * block_size)
    return replace(
        attention,
        slots=slots.masked_fill(~goes_on, padding_block * block_size),
        context_lens=contexts,
        cu_context_lens=ends,
    )
