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
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.layers.decoder import DecoderLayer, LayerShape, native_decoder
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
        self.attention = attention
        decoder = config.decoder
        self.dtype = dtype
        self.cos_sin = cos_sin_table(decoder.rope, decoder.head_dim, max_positions).to(device)

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
        self.qkv = linear("layer.self_attn.q_proj", "layer.self_attn.k_proj", "layer.self_attn.v_proj")
        self.q_norm = self.k_norm = None
        if decoder.qk_norm:
            self.q_norm, self.k_norm = (tensor(f"layer.self_attn.{name}_norm.weight").float() for name in "qk")
        self.output = linear("layer.self_attn.o_proj")
        self.mlp_norm = tensor("layer.post_attention_layernorm.weight").float()
        self.gate_up = linear("layer.mlp.gate_proj", "layer.mlp.up_proj")
        self.down = linear("layer.mlp.down_proj")
        layer = DecoderLayer(
            input_norm=None,
            qkv=self.qkv,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            output=self.output,
            attention_post_norm=None,
            mlp_norm=self.mlp_norm,
            gate_up=self.gate_up,
            down=self.down,
            mlp_post_norm=None,
            cos_sin=self.cos_sin,
            window=None,
        )
        shape = LayerShape(
            heads=decoder.num_heads,
            kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            gate="silu",
            attention_scale=decoder.head_dim**-0.5,
            eps=decoder.rms_norm_eps,
        )
        self.at_once = native_decoder(kernels, attention, ALONE, [layer], shape)
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
        decoder, kernels = self.config.decoder, self.kernels
        eps = decoder.rms_norm_eps
        embedded = kernels.rms_norm(kernels.embed(token_ids, self.embedding), self.embedding_norm, eps)
        normed = kernels.rms_norm(hidden, self.hidden_norm, eps)
        both = torch.cat((embedded, normed), dim=1)
        residual = normed if self.config.norm_before_residual else hidden
        if self.at_once is not None:
            out = residual.clone(memory_format=torch.contiguous_format)
            self.at_once.forward(out, positions, batch, [cache], given=both)
            return out
        heads, kv_heads = decoder.num_heads, decoder.num_kv_heads
        qkv = kernels.linear(both, self.qkv)
        qkv = qkv.view(len(hidden), heads + 2 * kv_heads, decoder.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = kernels.rms_norm(query, self.q_norm, eps), kernels.rms_norm(key, self.k_norm, eps)
            kernels.rotate_(query, positions, self.cos_sin)
            kernels.rotate_(key, positions, self.cos_sin)
            value = value.contiguous()
        else:
            kernels.rotate_(qkv[:, : heads + kv_heads], positions, self.cos_sin)
        attended = self.attention.attend(query, key, value, cache, batch, decoder.head_dim**-0.5, None)
        hidden = kernels.linear(attended, self.output, residual=residual)
        gate_up = kernels.linear(kernels.rms_norm(hidden, self.mlp_norm, eps), self.gate_up)
        return kernels.linear(kernels.silu_mul(gate_up), self.down, residual=hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, draft_vocab_size)."""
        return self.kernels.linear(
            self.kernels.rms_norm(hidden, self.norm, self.config.decoder.rms_norm_eps), self.head
        )
