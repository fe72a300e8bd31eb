"""EAGLE-3's head: one decoder layer that reads the target's hidden states (arXiv 2503.01840).

The row of position t is made of the target's features of position t, fused to one hidden state, and of the embedding
of the token at t + 1; its output predicts the token at t + 2. Further tokens are drafted with the layer's own output
instead of features. It knows no sequences, only rows and their batch, as the targets do. Its tensors' shapes and
names are the public checkpoints': see `engine.models.eagle3_checkpoint`.
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
from pilotfish.engine.models.eagle3_checkpoint import tensors_of
from pilotfish.engine.models.head_files import EMBEDDING, HEAD, TARGET_IDS
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.engine.models.weight_store import LayerWeights, WeightStore


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The matrices that a head may share with its target: the embedding, and the head if the vocabulary is the same."""

    embedding: PreparedLinear
    head: PreparedLinear


class Eagle3Model:
    """An EAGLE-3 head of the weights that `eagle3_checkpoint.read_weights` returns. An embedding or a head that is not
    among them is taken from `shared`."""

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
        declared = tensors_of(config)
        store = WeightStore({name: tensor for name, tensor in declared.items() if name in weights}, kernels, device)
        for name, tensor in weights.items():
            if name != TARGET_IDS:
                store.add(name, tensor)
        self.fusion = store.linear("fc")
        layer_weights = LayerWeights(store, "layer.")

        def norm(name: str) -> torch.Tensor:
            return layer_weights.norm(name).float()

        self.embedding_norm, self.hidden_norm = norm("input_layernorm"), norm("hidden_norm")
        layer = DecoderLayer(
            input_norm=None,
            qkv=layer_weights.linear("self_attn.qkv_proj"),
            q_norm=norm("self_attn.q_norm") if decoder.qk_norm else None,
            k_norm=norm("self_attn.k_norm") if decoder.qk_norm else None,
            output=layer_weights.linear("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            mlp=DenseMlp(layer_weights.linear("mlp.gate_up_proj"), layer_weights.linear("mlp.down_proj"), gate="silu"),
            cos_sin=cos_sin_table(decoder.rope, decoder.head_dim, max_positions).to(device),
            attention=AttentionParams(decoder.head_dim**-0.5),
        )
        shape = LayerShape(decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.rms_norm_eps)
        self.decoder = choose_decoder(kernels, attention, ALONE, [layer], shape)
        self.norm = store.norm("norm.weight").float()
        self.embedding = store.linear("embed_tokens") if EMBEDDING in weights else shared.embedding
        self.head = store.linear("lm_head") if HEAD in weights else shared.head
        self.target_ids: torch.Tensor | None = None
        """(draft_vocab_size,) int64: the target's id of each of the head's tokens; None where they are the same."""
        if TARGET_IDS in weights:
            self.target_ids = weights[TARGET_IDS].to(device)

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
