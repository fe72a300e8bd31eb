"""Gemma 3's decoder, the text part (arXiv 2503.19786).

What sets it apart from the Llama family: embeddings are scaled by sqrt(hidden_size); attention and MLP have a norm
before and another after them; a norm multiplies by 1 + its weight; query and key are normed, head by head; most layers
see a sliding window only and rotate by a base frequency of their own; the MLP's gate is GELU's tanh approximation.
"""

from __future__ import annotations

import torch

from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderFamily, LayerWeights


def _layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    return DecoderLayer(
        input_norm=weights.norm("input_layernorm"),
        qkv=weights.linear("self_attn.qkv_proj"),
        q_norm=weights.norm("self_attn.q_norm"),
        k_norm=weights.norm("self_attn.k_norm"),
        output=weights.linear("self_attn.o_proj"),
        attention_post_norm=weights.norm("post_attention_layernorm"),
        mlp_norm=weights.norm("pre_feedforward_layernorm"),
        mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "gelu"),
        mlp_post_norm=weights.norm("post_feedforward_layernorm"),
        cos_sin=cos_sin,
        attention=attention,
    )


GEMMA3 = DecoderFamily(_layer, norm_offset=1.0, scaled_embedding=True)
