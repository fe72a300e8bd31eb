"""EAGLE-3's draft: one decoder layer that reads the target's hidden states (arXiv 2503.01840).

The row of position t is made of the target's features of position t, fused to one hidden state, and of the embedding
of the token at t + 1; its output predicts the token at t + 2. Further tokens are drafted with the layer's own output
in the place of features. It knows no sequences, only rows and their batch, as the targets do. Its tensors' shapes and
names are the public checkpoints': see `engine.weights.eagle3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels, PreparedLinear
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.choose import choose_decoder
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp, LayerShape
from pilotfish.engine.models.config import Eagle3Config
from pilotfish.engine.models.rope import cos_sin_table


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """What a draft may take from its target: the embedding, and the head where the vocabularies are one."""

    embedding: PreparedLinear
    head: PreparedLinear


class Eagle3Model:
    """`weights` are those of `engine.weights.eagle3.read_weights`; an embedding or a head that is not among them is the
    target's, which the shape must allow."""

    def __init__(
        self,
        config: Eagle3Config,
        kernels: Kernels[Any],
        attention: AttentionBackend,
        weights: Mapping[str, torch.Tensor],
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedWeights,
    ) -> None:
        self.config = config
        self.kernels = kernels
        decoder = config.decoder
        self.dtype = dtype

        def tensor(name: str) -> torch.Tensor:
            return weights[name].to(device)

        def linear(*names: str) -> PreparedLinear:
            biases = [tensor(f"{name}.bias") for name in names if f"{name}.bias" in weights]
            weight = torch.cat([tensor(f"{name}.weight") for name in names])
            if weight.dtype != torch.int8:
                return kernels.prepare_linear(weight, torch.cat(biases) if biases else None)
            scale = torch.cat([tensor(f"{name}.weight_scale") for name in names])
            return kernels.prepare_linear(weight, torch.cat(biases) if biases else None, scale)

        self.fusion = linear("fc")
        self.embedding_norm = tensor("layer.input_layernorm.weight").float()
        self.hidden_norm = tensor("layer.hidden_norm.weight").float()
        q_norm, k_norm = (
            tensor(f"layer.self_attn.{name}_norm.weight").float() if decoder.qk_norm else None for name in "qk"
        )
        layer = DecoderLayer(
            input_norm=None,
            qkv=linear("layer.self_attn.q_proj", "layer.self_attn.k_proj", "layer.self_attn.v_proj"),
            q_norm=q_norm,
            k_norm=k_norm,
            output=linear("layer.self_attn.o_proj"),
            mlp_norm=tensor("layer.post_attention_layernorm.weight").float(),
            mlp=DenseMlp(
                linear("layer.mlp.gate_proj", "layer.mlp.up_proj"), linear("layer.mlp.down_proj"), gate="silu"
            ),
            cos_sin=cos_sin_table(decoder.rope, decoder.head_dim, max_positions).to(device),
            attention=AttentionParams(decoder.head_dim**-0.5),
        )
        shape = LayerShape(decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.rms_norm_eps)
        self.decoder = choose_decoder(kernels, attention, ALONE, [layer], shape)
        self.norm = tensor("norm.weight").float()
        self.embedding = linear("embed_tokens") if "embed_tokens.weight" in weights else shared.embedding
        self.head = linear("lm_head") if "lm_head.weight" in weights else shared.head
        self.target_ids: torch.Tensor | None = None
        """(draft_vocab_size,) int64: the target's id of each of the draft's tokens; None where they are the same."""
        if "target_ids" in weights:
            self.target_ids = tensor("target_ids")

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features, (rows, layers * target_hidden_size) -> hidden states (rows, hidden_size)."""
        return self.kernels.linear(features, self.fusion)

    def forward(
        self,
        hidden: torch.Tensor,  # (rows, hidden_size): of `fuse`, or an earlier row's output
        token_ids: torch.Tensor,  # (rows,) int64: the token after each row's position, target's ids
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """The layer's output, before the norm: (rows, hidden_size)."""
        kernels, eps = self.kernels, self.config.decoder.rms_norm_eps
        embedded = kernels.rms_norm(kernels.embed(token_ids, self.embedding), self.embedding_norm, eps)
        normed = kernels.rms_norm(hidden, self.hidden_norm, eps)
        residual = normed if self.config.norm_before_residual else hidden
        both = torch.cat((embedded, normed), dim=1)
        return self.decoder.forward(residual, positions, batch, [cache], given=both)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, draft_vocab_size)."""
        return self.kernels.linear(
            self.kernels.rms_norm(hidden, self.norm, self.config.decoder.rms_norm_eps), self.head
        )
