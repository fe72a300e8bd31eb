"""A mixture of experts: the second half of a layer, of which each row computes a few parts only."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.decoder import DenseMlp, Linears
from pilotfish.engine.layers.native_experts import NativeExperts


@dataclass(frozen=True, slots=True)
class Expert:
    """A gated MLP (see `DenseMlp`)."""

    gate_up: PreparedLinear
    down: PreparedLinear


@dataclass(frozen=True, slots=True)
class ExpertMlp:
    """Experts, of which each row takes the `per_token` that its router finds most likely, and sums their results with
    these probabilities (arXiv 1701.06538, 2101.03961).

    A row's result does not depend on the rows that share its experts: products are batch-invariant where the kernels'
    are, and a row's experts are added up in the order of its own probabilities.
    """

    router: PreparedLinear
    experts: Seq[Expert | None]  # all of them; None: it is on another rank
    per_token: int
    normalized: bool  # whether the probabilities of a row's experts are made to sum to 1
    shared: DenseMlp | None = None  # which every row takes as well
    shared_gate: PreparedLinear | None = None  # (1, hidden_size): a row's factor of `shared`, before a sigmoid
    chosen_only: bool = False  # the router's softmax is over a row's experts alone
    clamp: float | None = None  # see `gated`
    native: NativeExperts | None = None  # the same experts for the native kernels, where these know them

    def forward(self, linears: Linears, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """See `Mlp.forward`."""
        kernels = linears.kernels
        probs, chosen = self.route(kernels.linear(x, self.router))
        if self.native is not None and isinstance(kernels, NativeKernels):
            y = self.native.forward(kernels, x, probs, chosen)
        else:
            y = self._summed(kernels, x, probs, chosen)
        if self.shared is not None:
            gate_up = linears.apply("shared_gate_up", x, self.shared.gate_up)
            z = linears.apply("shared_down", kernels.silu_mul(gate_up), self.shared.down)
            if self.shared_gate is not None:
                # As wide as z: torch computes the last few numbers of a tensor in another way than the rest.
                z = z * torch.sigmoid(kernels.linear(x, self.shared_gate).expand_as(z).contiguous())
            y = y + z
        y = linears.comm.all_reduce(y)
        return y if residual is None else y.add_(residual)

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A router's logits (rows, experts) -> probabilities, float32, and numbers of each row's experts, (rows,
        per_token) each, the most likely first."""
        if self.chosen_only:
            scores, chosen = logits.float().topk(self.per_token, dim=-1)
            return torch.softmax(scores, dim=-1), chosen
        probs, chosen = torch.softmax(logits.float(), dim=-1).topk(self.per_token, dim=-1)
        return (probs / probs.sum(dim=-1, keepdim=True) if self.normalized else probs), chosen

    def gated(self, kernels: Kernels[Any], gate_up: torch.Tensor) -> torch.Tensor:
        """(rows, 2 * size), gate first -> (rows, size): SwiGLU, or gpt-oss's form of it if there is a clamp."""
        if self.clamp is None:
            return kernels.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    def _summed(
        self, kernels: Kernels[Any], x: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """The sum over each row's experts that are on this rank: (rows, hidden_size)."""
        weights = probs.to(x.dtype)
        # A single row leaves nothing to group.
        y = self._of_one(kernels, x, chosen[0].tolist()) if len(x) == 1 else self._grouped(kernels, x, chosen)
        total = y[0] * weights[:, :1]
        for i in range(1, len(y)):  # one after the other: a sum over a dimension may take another order for more rows
            total += y[i] * weights[:, i : i + 1]
        return total

    def _of_one(self, kernels: Kernels[Any], x: torch.Tensor, chosen: Seq[int]) -> Seq[torch.Tensor]:
        """The results of a row's experts, (1, hidden_size) each."""
        results = []
        for number in chosen:
            expert = self.experts[number]
            if expert is None:
                results.append(torch.zeros_like(x))
            else:
                gated = self.gated(kernels, kernels.linear(x, expert.gate_up))
                results.append(kernels.linear(gated, expert.down))
        return results

    def _grouped(self, kernels: Kernels[Any], x: torch.Tensor, chosen: torch.Tensor) -> Seq[torch.Tensor]:
        """The results of each row's first expert, second, ..., (rows, hidden_size) each: expert by expert."""
        count = chosen.shape[1]
        pairs = chosen.flatten()  # pair p is of row p // count
        order = torch.argsort(pairs, stable=True)
        grouped = x[order // count]
        results = x.new_zeros(len(order), x.shape[1])
        start = 0
        for expert, size in zip(self.experts, torch.bincount(pairs, minlength=len(self.experts)).tolist(), strict=True):
            if size and expert is not None:
                gated = self.gated(kernels, kernels.linear(grouped[start : start + size], expert.gate_up))
                results[start : start + size] = kernels.linear(gated, expert.down)
            start += size
        y = torch.empty_like(results)
        y[order] = results
        return y.view(len(x), count, -1).unbind(1)
