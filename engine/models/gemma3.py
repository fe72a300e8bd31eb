"""Gemma 3's decoder, the text part (arXiv 2503.19786).

What sets it apart from the Llama family: embeddings are scaled by sqrt(hidden_size); attention and MLP have a norm
before and another after them; a norm multiplies by 1 + its weight; query and key are normed, head by head; most layers
see a sliding window only and rotate by a base frequency of their own; the MLP's gate is GELU's tanh approximation.
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
class Gemma3Layer(DecoderLayer):
    """Norms are float32 and what they multiply by, 1 + weight."""

    input_norm: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    attention_post_norm: torch.Tensor
    mlp_post_norm: torch.Tensor


class Gemma3Model:
    """Rows in, hidden states out; `logits` of those rows that are asked for. Made as `registry.ModelClass` says."""

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
        self.attention_scale = config.attention_scale or config.head_dim**-0.5
        store = WeightStore(self.layout, kernels, device)
        for name, tensor in weights:
            store.add(name, tensor)
        self.embedding = store.linear("model.embed_tokens")
        self.head = self.embedding if config.tie_embeddings else store.linear("lm_head")
        norm = store.tensor("model.norm.weight")
        self.norm = _one_plus(norm)
        # A tensor, since the model was trained with the root rounded to its dtype (25.25, not 25.298, in bfloat16).
        self.embedding_scale = torch.full((), config.hidden_size**0.5, dtype=norm.dtype, device=device)
        everywhere = cos_sin_table(config.rope, config.head_dim, max_positions).to(device)
        nearby = cos_sin_table(config.local_rope or config.rope, config.head_dim, max_positions).to(device)
        kinds = {True: (config.sliding_window, nearby), False: (None, everywhere)}
        sliding = config.sliding_layers or (config.sliding_window is not None,) * config.num_layers
        self.layers = [self._layer(store, f"model.layers.{i}.", *kinds[slides]) for i, slides in enumerate(sliding)]
        shape = LayerShape(
            heads=self.layout.num_heads,
            kv_heads=self.layout.num_kv_heads,
            head_dim=config.head_dim,
            gate="gelu",
            attention_scale=self.attention_scale,
            eps=config.rms_norm_eps,
        )
        self.at_once = native_decoder(kernels, attention, comm, self.layers, shape)

    def _layer(self, store: WeightStore, prefix: str, window: int | None, cos_sin: torch.Tensor) -> Gemma3Layer:
        def norm(name: str) -> torch.Tensor:
            return _one_plus(store.tensor(f"{prefix}{name}.weight"))

        return Gemma3Layer(
            input_norm=norm("input_layernorm"),
            qkv=store.linear(prefix + "self_attn.qkv_proj"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            output=store.linear(prefix + "self_attn.o_proj"),
            attention_post_norm=norm("post_attention_layernorm"),
            mlp_norm=norm("pre_feedforward_layernorm"),
            gate_up=store.linear(prefix + "mlp.gate_up_proj"),
            down=store.linear(prefix + "mlp.down_proj"),
            mlp_post_norm=norm("post_feedforward_layernorm"),
            window=window,
            cos_sin=cos_sin,
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
        hidden = embed(kernels, comm, self.layout, token_ids, self.embedding).mul_(self.embedding_scale)
        if self.at_once is not None:
            self.at_once.forward(hidden, positions, batch, caches, tap)
            return hidden
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if tap is not None:
                tap.take(index, hidden)
            attended = self._attend(layer, kernels.rms_norm(hidden, layer.input_norm, eps), positions, batch, cache)
            change = summed_linear(kernels, comm, attended, layer.output)
            hidden += kernels.rms_norm(change, layer.attention_post_norm, eps)
            gate_up = kernels.linear(kernels.rms_norm(hidden, layer.mlp_norm, eps), layer.gate_up)
            change = summed_linear(kernels, comm, kernels.gelu_mul(gate_up), layer.down)
            hidden += kernels.rms_norm(change, layer.mlp_post_norm, eps)
        if tap is not None:
            tap.take(len(self.layers), hidden)
        return hidden

    def _attend(
        self, layer: Gemma3Layer, x: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, cache: LayerCache
    ) -> torch.Tensor:
        config, kernels = self.config, self.kernels
        heads, kv_heads = self.layout.num_heads, self.layout.num_kv_heads
        qkv = kernels.linear(x, layer.qkv).view(len(x), heads + 2 * kv_heads, config.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        query = kernels.rms_norm(query, layer.q_norm, config.rms_norm_eps)
        key = kernels.rms_norm(key, layer.k_norm, config.rms_norm_eps)
        kernels.rotate_(query, positions, layer.cos_sin)
        kernels.rotate_(key, positions, layer.cos_sin)
        return self.attention.attend(query, key, value.contiguous(), cache, batch, self.attention_scale, layer.window)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) as `forward` returns them -> (rows, vocab_size), on rank 0."""
        normed = self.kernels.rms_norm(hidden, self.norm, self.config.rms_norm_eps)
        return logits(self.kernels, self.comm, self.layout, normed, self.head)


def _one_plus(weight: torch.Tensor) -> torch.Tensor:
    """In float32: the sum would lose most of a bfloat16 weight's digits."""
    return 1.0 + weight.float()
