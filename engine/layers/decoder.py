"""The interface of decoders, the stacks of layers between token embedding and final norm, and the parts of a layer.

Two implementations give the same bits: `operator_decoder` computes any layer with `Kernels`, operator by operator;
`fused_decoder` computes the layers that it supports in one native call. `choose` picks one when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pilotfish.engine.kernels.protocol import Gate, Kernels, PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.communicator import Communicator


class Adapter(Protocol):
    """Changes the results of one layer's linears, as low-rank adapters (LoRA, arXiv 2106.09685) do."""

    def add_(self, name: str, x: torch.Tensor, y: torch.Tensor, batch: AttentionBatch) -> None:
        """Add the adapter's change to y (rows, out_features), the result of the linear `name` for x (rows,
        in_features). `name` is "qkv", "output", "gate_up" or "down", or a name that another MLP than `DenseMlp` gives
        its own.

        Rows without an adapter must keep their bits. Of a linear that is sharded by columns, x is this rank's part and
        y its summand.
        """
        ...


@dataclass(frozen=True, slots=True)
class Linears:
    """Applies a layer's linears: kernels, the layer's adapter if it has one, and the sum over tensor-parallel ranks."""

    kernels: Kernels[Any]
    comm: Communicator
    adapter: Adapter | None = None
    batch: AttentionBatch | None = None  # set where there is an adapter

    def apply(self, name: str, x: torch.Tensor, weight: PreparedLinear) -> torch.Tensor:
        """Apply a linear: (rows, in_features) -> (rows, out_features), on each rank its part of them."""
        y = self.kernels.linear(x, weight)
        if self.adapter is not None:
            assert self.batch is not None
            self.adapter.add_(name, x, y, self.batch)
        return y

    def sharded_rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm over a dimension that is sharded: (rows, this rank's part) and its weights -> the same shape. Entries
        may be on several ranks, if all are on as many."""
        if self.comm.size == 1:
            return self.kernels.rms_norm(x, weight, eps)
        wide = x.float()
        squares = self.comm.all_reduce(wide.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / (x.shape[-1] * self.comm.size) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def summed(self, name: str, x: torch.Tensor, weight: PreparedLinear, residual: torch.Tensor | None) -> torch.Tensor:
        """A linear that is sharded by columns, plus `residual` if given: (rows, this rank's part of in_features) ->
        (rows, out_features), a new tensor with the same bits on every rank.

        The residual is added last: in 16 bits a summand that large would cost the others their precision.
        """
        if self.comm.size == 1 and self.adapter is None:
            return self.kernels.linear(x, weight, residual=residual)
        y = self.comm.all_reduce(self.apply(name, x, weight))
        return y if residual is None else y.add_(residual)


class Mlp(Protocol):
    """The second half of a layer, between its norm and its residual connection."""

    def forward(self, linears: Linears, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """x (rows, hidden_size), normed, -> (rows, hidden_size), summed over the ranks, plus `residual` if given."""
        ...


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """A gated MLP (arXiv 2002.05202): down(activation(gate(x)) * up(x))."""

    gate_up: PreparedLinear  # gate, then up
    down: PreparedLinear
    gate: Gate

    def forward(self, linears: Linears, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        kernels = linears.kernels
        if linears.adapter is None:
            gated = kernels.gated_linear(x, self.gate_up, self.gate)
        else:  # which changes what the activation is applied to
            gate_up = linears.apply("gate_up", x, self.gate_up)
            gated = kernels.silu_mul(gate_up) if self.gate == "silu" else kernels.gelu_mul(gate_up)
        return linears.summed("down", gated, self.down, residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer's weights. A norm that the architecture does not have is None."""

    input_norm: torch.Tensor | None  # None: attention reads the `given` of `Decoder.forward`, or the hidden states
    qkv: PreparedLinear  # query, key and value heads in this order
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    whole_norms: bool = False  # norms of query and key are over all heads at once, those of other ranks included
    output: PreparedLinear
    attention_post_norm: torch.Tensor | None = None  # of what attention adds to the hidden states
    mlp_norm: torch.Tensor | None
    mlp: Mlp
    mlp_post_norm: torch.Tensor | None = None
    residual_scale: float = 1.0  # of what attention and MLP add to the hidden states
    cos_sin: torch.Tensor  # (max_positions, head_dim) float32; shared by the layers of a kind
    attention: AttentionParams
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape that all layers of a decoder share; heads are those of this rank."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class Tap(Protocol):
    """Reads hidden states on their way through the layers (`engine.models.features`)."""

    @property
    def layers(self) -> Seq[int]: ...

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """Read `hidden`, the input of `layer`, one of `layers`. It is valid until the next layer runs."""
        ...


class Decoder(Protocol):
    """Runs the layers of a model, or of this rank's part of it."""

    layers: Seq[DecoderLayer]
    shape: LayerShape

    def forward(
        self,
        hidden: torch.Tensor,  # (rows, hidden_size); left as it is
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],  # one for each layer
        tap: Tap | None = None,
        given: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last layer, (rows, hidden_size). The rows' keys and values are in the caches
        afterwards.

        given: (rows, in_features of qkv) contiguous, what attention reads in layers that have no `input_norm`; None:
        it reads the hidden states there.
        """
        ...


def run_sections(
    run: Callable[[int, int, torch.Tensor], torch.Tensor], count: int, hidden: torch.Tensor, tap: Tap | None
) -> torch.Tensor:
    """Run `count` layers by `run(first, stop, hidden)`, in as few calls as the tap allows; returns the last layer's
    output."""
    if tap is None:
        return run(0, count, hidden)
    first = 0
    for stop in sorted(set(tap.layers)):
        hidden = run(first, stop, hidden)
        tap.take(stop, hidden)
        first = stop
    return run(first, count, hidden)
