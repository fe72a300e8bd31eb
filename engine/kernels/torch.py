"""The reference kernels: torch's operators, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pilotfish.engine.kernels import paged
from pilotfish.engine.kernels.fp8 import Fp8Linear, fp8_linear, prepare_fp8
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.weights.blocks import Blocks


@dataclass(frozen=True, slots=True)
class TorchLinear:
    weight: torch.Tensor  # (out_features, in_features)
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


class TorchKernels:
    """See `protocol.FusedKernels`, too."""

    name = "torch"
    fuses = False
    draws = False
    """Whether there is a kernel that draws tokens."""

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> TorchLinear | Fp8Linear:
        if scale is not None:
            if weight.dtype == torch.float8_e4m3fn:
                return prepare_fp8(weight, bias, scale)
            weight = (weight.float() * scale).to(torch.float32 if bias is None else bias.dtype)
        return TorchLinear(weight.contiguous(), None if bias is None else bias.contiguous())

    def prepare_blocks(self, parts: Seq[torch.Tensor | Blocks], bias: torch.Tensor | None = None) -> TorchLinear:
        raise ValueError("torch's operators do not compute with quantized blocks: use dtype float32")

    def linear(
        self, x: torch.Tensor, weight: TorchLinear | Fp8Linear, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = fp8_linear(x, weight) if isinstance(weight, Fp8Linear) else F.linear(x, weight.weight, weight.bias)
        return y if residual is None else y.add_(residual)

    def gated_linear(self, x: torch.Tensor, weight: TorchLinear | Fp8Linear, gate: Gate) -> torch.Tensor:
        gate_up = self.linear(x, weight)
        return self.silu_mul(gate_up) if gate == "silu" else self.gelu_mul(gate_up)

    def embed(self, ids: torch.Tensor, weight: TorchLinear | Fp8Linear) -> torch.Tensor:
        if isinstance(weight, Fp8Linear):
            raise ValueError("an embedding in fp8 cannot be looked up: leave embed_tokens and a tied head unquantized")
        return F.embedding(ids, weight.weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    def add_norm(
        self,
        hidden: torch.Tensor,
        change: torch.Tensor | None,
        post_weight: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if change is not None:
            hidden = hidden + (change if post_weight is None else self.rms_norm(change, post_weight, eps))
        return hidden, hidden if weight is None else self.rms_norm(hidden, weight, eps)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        kv_heads: int,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        eps: float,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
    ) -> torch.Tensor:
        heads = qkv.shape[1] - 2 * kv_heads
        query: torch.Tensor
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if norms is not None:
            query, key = self.rms_norm(query, norms[0], eps), self.rms_norm(key, norms[1], eps)
            self.rotate_(query, positions, cos_sin)
            self.rotate_(key, positions, cos_sin)
        else:
            self.rotate_(qkv[:, : heads + kv_heads], positions, cos_sin)  # both in one call
        paged.write(*cache, key, value, slots)
        return query

    def rotate_(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        cosine, sine = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # (rows, 1, head_dim / 2) each
        low, high = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1))

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
