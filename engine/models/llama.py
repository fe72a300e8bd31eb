"""The Llama family's decoder: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, told apart by their ModelConfig alone.

(arXiv 2302.13971, 2307.09288, 2407.21783; Qwen2's biases 2407.10671; Qwen3's norms of query and key 2505.09388.)
The model is written once against `Kernels` and `AttentionBackend`; it knows no sequences, only rows and their batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.engine.kernels.protocol import Kernels
from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.layers.decoder import DecoderLayer, LayerShape, native_decoder
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.rope import cos_sin_table
from pilotfish.engine.models.sharded import embed, logits, summed_linear
from pilotfish.engine.models.weight_store import WeightStore


@dataclass(frozen=True, slots=True)
class LlamaLayer(DecoderLayer):
    input_norm: torch.Tensor


class LlamaModel:
    """Rows in, hidden states out; `logits` of those rows that are asked for.

    `weights` has the parts of rank `comm.rank` (see `Layout`). Raises ModelError if one is missing. They are consumed
    one by one: a fused matrix is laid out as soon as its parts are there, so that the peak is the model and a few
    tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels[Any],
        attention: AttentionBackend,
        weights: Iterable[tuple[str, torch.Tensor]],
        max_positions: int,
        device: torch.device,
        comm: Communicator = ALONE,
    ) -> None:
        self.config = config
        self.comm = comm
        self.layout = Layout(config, comm.rank, comm.size)
        self.kernels = kernels
        self.attention = attention
        self.cos_sin = cos_sin_table(config.rope, config.head_dim, max_positions).to(device)
        store = WeightStore(self.layout, kernels, device)
        for name, tensor in weights:
            store.add(name, tensor)
        self.embedding = store.linear("model.embed_tokens")
        self.head = self.embedding if config.tie_embeddings else store.linear("lm_head")
        self.norm = store.tensor("model.norm.weight")
        self.layers = [self._layer(store, f"model.layers.{i}.") for i in range(config.num_layers)]
        shape = LayerShape(
            heads=self.layout.num_heads,
            kv_heads=self.layout.num_kv_heads,
            head_dim=config.head_dim,
            gate="silu",
            attention_scale=config.head_dim**-0.5,
            eps=config.rms_norm_eps,
        )
        self.at_once = native_decoder(kernels, attention, comm, self.layers, shape)

    def _layer(self, store: WeightStore, prefix: str) -> LlamaLayer:
        norms = self.config.qk_norm
        return LlamaLayer(
            input_norm=store.tensor(prefix + "input_layernorm.weight"),
            qkv=store.linear(prefix + "self_attn.qkv_proj"),
            q_norm=store.tensor(prefix + "self_attn.q_norm.weight") if norms else None,
            k_norm=store.tensor(prefix + "self_attn.k_norm.weight") if norms else None,
            output=store.linear(prefix + "self_attn.o_proj"),
            attention_post_norm=None,
            mlp_norm=store.tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=store.linear(prefix + "mlp.gate_up_proj"),
            down=store.linear(prefix + "mlp.down_proj"),
            mlp_post_norm=None,
            cos_sin=self.cos_sin,
            window=self.config.sliding_window,
        )

    def forward(
        self,
        token_ids: torch.Tensor,  # (rows,) int64
        positions: torch.Tensor,  # (rows,) int64
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: (rows, hidden_size)."""
        eps, kernels, comm = self.config.rms_norm_eps, self.kernels, self.comm
        hidden = embed(kernels, comm, self.layout, token_ids, self.embedding)
        if self.at_once is not None:
            self.at_once.forward(hidden, positions, batch, caches, tap)
            return hidden
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if tap is not None:
                tap.take(index, hidden)
            attended = self._attend(layer, kernels.rms_norm(hidden, layer.input_norm, eps), positions, batch, cache)
            hidden = summed_linear(kernels, comm, attended, layer.output, residual=hidden)
            gate_up = kernels.linear(kernels.rms_norm(hidden, layer.mlp_norm, eps), layer.gate_up)
            hidden = summed_linear(kernels, comm, kernels.silu_mul(gate_up), layer.down, residual=hidden)
        if tap is not None:
            tap.take(len(self.layers), hidden)
        return hidden

    def _attend(
        self, layer: LlamaLayer, x: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, cache: LayerCache
    ) -> torch.Tensor:
        config, kernels = self.config, self.kernels
        heads, kv_heads = self.layout.num_heads, self.layout.num_kv_heads
        qkv = kernels.linear(x, layer.qkv).view(len(x), heads + 2 * kv_heads, config.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = kernels.rms_norm(query, layer.q_norm, config.rms_norm_eps)
            key = kernels.rms_norm(key, layer.k_norm, config.rms_norm_eps)
            kernels.rotate_(query, positions, self.cos_sin)
            kernels.rotate_(key, positions, self.cos_sin)
            value = value.contiguous()
        else:
            kernels.rotate_(qkv[:, : heads + kv_heads], positions, self.cos_sin)
        scale = config.head_dim**-0.5
        return self.attention.attend(query, key, value, cache, batch, scale, config.sliding_window)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, vocab_size), on rank 0."""
        normed = self.kernels.rms_norm(hidden, self.norm, self.config.rms_norm_eps)
        return logits(self.kernels, self.comm, self.layout, normed, self.head)
